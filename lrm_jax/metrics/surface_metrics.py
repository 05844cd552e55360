"""How close a surface is to the true one: Chamfer distance and F-score of points on both, after alignment.

The protocol of TripoSR's table 1 (https://arxiv.org/abs/2403.02151, section 3: 10k points, a linear search over rotations for
the lowest Chamfer distance, then ICP). Its code was never released (https://github.com/VAST-AI-Research/TripoSR/issues/129);
`PROTOCOL` lists our choices where the report is silent. NumPy and SciPy only: nothing here needs a device.
"""

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from lrm_jax.types import InputError

NUM_POINTS = 10_000
THRESHOLDS = (0.1, 0.2, 0.5)
NUM_AZIMUTHS = 24  # every 15 degrees
TILTS_DEG = (-25.0, 25.0)  # about x, and about y; no tilt is tried, too
SEARCH_POINTS, ICP_POINTS = 500, 1000  # out of NUM_POINTS
ICP_STEPS, ICP_ROUNDS = 25, 2

NAMES = ("chamfer", *(f"fscore@{threshold}" for threshold in THRESHOLDS))
PROTOCOL = {
    "points": f"{NUM_POINTS} on each surface, uniform in area",
    "normalisation": "both shapes are moved and scaled so that their bounding box is centred on the origin and its longest side "
    "is 2; the prediction again after every rotation",
    "search": f"{NUM_AZIMUTHS} azimuths x (upright, and tilted by {TILTS_DEG[0]:g} and {TILTS_DEG[1]:g} degrees about either "
    f"horizontal axis), by the Chamfer distance of {SEARCH_POINTS} points; the best of each quarter turn is kept",
    "icp": f"rigid, on points and their nearest neighbours in both directions, at most {ICP_STEPS} steps: from each of the four "
    f"on {SEARCH_POINTS} points, then from the best result on {ICP_POINTS} points, {ICP_ROUNDS} times, normalising again each "
    "time; the final result or the normalised prediction without rotation, whichever has the lower Chamfer distance",
    "chamfer": "mean of the mean distances (not squared) from prediction to truth and from truth to prediction",
    "fscore": "harmonic mean of two shares: of the predicted points within the threshold of the truth, and of the true points "
    "within the threshold of the prediction",
}


def sample_surface(
    vertices: Float[np.ndarray, "N 3"],
    faces: Int[np.ndarray, "M 3"],
    count: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "count 3"]:
    """Points on triangles, uniform in area.

    Raises:
      InputError: the triangles have no area.
    """
    corners = vertices[faces].astype(np.float64)
    edges = corners[:, 1:] - corners[:, :1]
    area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=-1)
    total = np.cumsum(area)
    if not len(faces) or not total[-1] > 0:
        raise InputError("the surface has no area")
    chosen = np.searchsorted(total, rng.uniform(0, total[-1], count), side="right")
    # Points of the unit square, with its upper half folded onto the lower one, are uniform in the triangle.
    uv = rng.uniform(size=(count, 2))
    uv = np.where(uv.sum(-1, keepdims=True) > 1, 1 - uv, uv)
    chosen = np.minimum(chosen, len(faces) - 1)
    return corners[chosen, 0] + np.einsum("qi,qij->qj", uv, edges[chosen])


def scores(points: Float[np.ndarray, "Q 3"], truth: Float[np.ndarray, "T 3"]) -> dict[str, float]:
    """Chamfer distance and F-scores of points without alignment, in their unit: see `PROTOCOL`."""
    accuracy, completeness = _distances(points, truth)
    result = {"chamfer": _chamfer(accuracy, completeness)}
    for threshold in THRESHOLDS:
        precision, recall = (accuracy < threshold).mean(), (completeness < threshold).mean()
        both = precision + recall
        result[f"fscore@{threshold}"] = float(2 * precision * recall / both) if both else 0.0
    return result


def normalized(points: Float[np.ndarray, "Q 3"]) -> Float[np.ndarray, "Q 3"]:
    """The points with their bounding box centred on the origin and its longest side 2.

    Raises:
      InputError: they are not finite, or all at one place.
    """
    if not np.isfinite(points).all():
        raise InputError("some points are not finite")
    centre, scale = _box(points)
    return (points - centre) * scale


def aligned_scores(
    points: Float[np.ndarray, "Q 3"], truth: Float[np.ndarray, "T 3"], seed: int = 0
) -> dict[str, float]:
    """`scores` after normalising both and aligning the prediction with the truth: see `PROTOCOL`.

    Args:
      points: the prediction, z up.
      truth: the true surface, z up.
      seed: for the choice of the points that the alignment uses.

    Raises:
      InputError: points are not finite, or all at one place.
    """
    points, truth = normalized(points), normalized(truth)
    rng = np.random.default_rng(seed)
    points, truth = rng.permutation(points), rng.permutation(truth)
    few, few_true = points[:SEARCH_POINTS], truth[:SEARCH_POINTS]
    starts = [_icp(few, few_true, rotation) for rotation in _search(few, few_true)]
    costs = [_chamfer(*_distances(few @ turn.T + shift, few_true)) for turn, shift in starts]
    turn, _ = starts[int(np.argmin(costs))]
    for _ in range(ICP_ROUNDS):
        turn, shift = _icp(points, truth, turn / np.cbrt(np.linalg.det(turn)))
    found = [scores(points @ turn.T + shift, truth), scores(points, truth)]
    return min(found, key=lambda score: score["chamfer"])


def _rotations() -> Float[np.ndarray, "quarters K 3 3"]:
    """The rotations to search, grouped by the quarter turn about z that they are in."""
    tilts = [np.zeros(3), *(np.eye(3)[axis] * tilt for axis in (0, 1) for tilt in TILTS_DEG)]
    tilts = Rotation.from_rotvec(tilts, degrees=True)
    azimuths = 360.0 * np.arange(NUM_AZIMUTHS) / NUM_AZIMUTHS - 45.0
    turns = Rotation.from_euler("z", azimuths[:, None], degrees=True)
    rotations = np.einsum("aij,tjk->atik", turns.as_matrix(), tilts.as_matrix())
    return rotations.reshape(4, -1, 3, 3)


def _search(
    points: Float[np.ndarray, "Q 3"], truth: Float[np.ndarray, "T 3"]
) -> list[Float[np.ndarray, "3 3"]]:
    """For each quarter turn, the rotation after which the normalised points have the lowest Chamfer distance."""
    tree, true_tree = cKDTree(points), cKDTree(truth)
    best = []
    for quarter in _rotations():
        costs = []
        for rotation in quarter:
            centre, scale = _box(points @ rotation.T)
            accuracy, _ = true_tree.query((points @ rotation.T - centre) * scale)
            # The truth is rotated back instead of rotating the points, so that their tree is built once.
            completeness, _ = tree.query((truth / scale + centre) @ rotation)
            costs.append(_chamfer(accuracy, scale * completeness))
        best.append(quarter[int(np.argmin(costs))])
    return best


def _icp(
    points: Float[np.ndarray, "Q 3"],
    truth: Float[np.ndarray, "T 3"],
    rotation: Float[np.ndarray, "3 3"],
) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, "3"]]:
    """The result of ICP (https://doi.org/10.1109/34.121791) from a rotation: a matrix, which includes the scale, and a shift."""
    centre, scale = _box(points @ rotation.T)
    turn, shift = scale * rotation, -scale * centre
    points, truth = points[:ICP_POINTS], truth[:ICP_POINTS]
    tree = cKDTree(truth)
    for _ in range(ICP_STEPS):
        aligned = points @ turn.T + shift
        _, nearest_true = tree.query(aligned)
        _, nearest = cKDTree(aligned).query(truth)
        step_turn, step = _rigid_fit(
            np.concatenate([aligned, aligned[nearest]]),
            np.concatenate([truth[nearest_true], truth]),
        )
        turn, shift = step_turn @ turn, step_turn @ shift + step
        if np.abs(step_turn - np.eye(3)).max() + np.abs(step).max() < 1e-4:
            break
    return turn, shift


def _rigid_fit(
    points: Float[np.ndarray, "Q 3"], wanted: Float[np.ndarray, "Q 3"]
) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, "3"]]:
    """Rotation R and shift t that bring R p + t nearest to `wanted` (Kabsch, https://doi.org/10.1107/S0567739476001873)."""
    centre, wanted_centre = points.mean(0), wanted.mean(0)
    u, _, vt = np.linalg.svd((wanted - wanted_centre).T @ (points - centre))
    # No reflection.
    rotation = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
    return rotation, wanted_centre - rotation @ centre


def _box(points):
    """Centre, and the factor that makes the longest side of the box 2."""
    low, high = points.min(0), points.max(0)
    longest = (high - low).max()
    if not longest > 0:
        raise InputError("all points are at one place")
    return (low + high) / 2, 2 / longest


def _distances(points, truth):
    """Distances from each point to the nearest true point, and from each true point to the nearest point."""
    return cKDTree(truth).query(points)[0], cKDTree(points).query(truth)[0]


def _chamfer(accuracy, completeness) -> float:
    return float((accuracy.mean() + completeness.mean()) / 2)
