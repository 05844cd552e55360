"""Matches by SIFT (Lowe 2004, https://doi.org/10.1023/B:VISI.0000029664.99615.94), which needs no weights."""

import numpy as np
from jaxtyping import Float, UInt8

from lrm_jax.elevation.estimate import PAIRS, SIDE, Matches

RATIO = 0.8  # of the distances to the best and the second best descriptor, at most


def matches(images: UInt8[np.ndarray, "4 H W 3"]) -> Matches:
    """Matches the four neighbours of an image, see `elevation.estimate`. The images are square, of any size.

    The confidence is 1 minus the ratio of the descriptors' distances to the best and to the second best.
    """
    found = [keypoints(image) for image in images]
    return {(i, j): match(*found[i], *found[j]) for i, j in PAIRS}


def keypoints(image, c_dog=0.04/3, c_edge=10, upsampling=2):
    from skimage.color import rgb2gray
    from skimage.feature import SIFT

    sift = SIFT(upsampling=upsampling, c_dog=c_dog, c_edge=c_edge)
    try:
        sift.detect_and_extract(rgb2gray(image))
    except RuntimeError:
        return np.zeros((0, 2)), np.zeros((0, 128), np.float32)
    xy = (sift.positions[:, ::-1] + 0.5) * SIDE / image.shape[0]
    return xy, sift.descriptors.astype(np.float32)


def match(xy_a, des_a, xy_b, des_b, ratio=RATIO, reach=64, root=False):
    if len(xy_a)<1 or len(xy_b)<1: return np.zeros((0,5))
    a,b=des_a.astype(np.float64),des_b.astype(np.float64)
    if root:
        a=np.sqrt(a/a.sum(1,keepdims=True)); b=np.sqrt(b/b.sum(1,keepdims=True))
    else:
        a=a/np.linalg.norm(a,axis=1,keepdims=True); b=b/np.linalg.norm(b,axis=1,keepdims=True)
    d=np.sqrt(np.maximum(2-2*a@b.T,0))
    far=np.linalg.norm(xy_a[:,None]-xy_b[None],axis=-1)>reach
    d=np.where(far,np.inf,d)
    best=d.argmin(1); back=d.argmin(0)
    rows=np.arange(len(a))
    m=(back[best]==rows)&np.isfinite(d[rows,best])
    first=d[rows,best]
    second=np.full(len(a),np.inf)
    # second best: not at nearly the same place (several orientations of one point)
    other=np.where(np.linalg.norm(xy_b[best][:,None]-xy_b[None],axis=-1)<2,np.inf,d)
    second=other.min(1)
    r=first/np.maximum(second,1e-9)
    r=np.where(np.isfinite(second),r,first)
    m&=r<ratio
    return np.column_stack([xy_a[m],xy_b[best[m]],1-r[m]])
