"""The library: models from any weights, scenes from images, meshes and views from scenes. The commands use it, too.

    model = lrm_jax.load("hf:stabilityai/TripoSR", dtype="bfloat16")
    scene = model.reconstruct("chair.png")
    scene.mesh(resolution=256, texture=1024).export("chair.glb")
    frames = scene.render(lrm_jax.orbit(24), size=512)

From posed images (One-2-3-45): `model.reconstruct("capture/")`.

Programs are compiled once per shape: for the model's image size, whatever the size of the image; for each size of rendered views;
and for the chunks of points that meshes are made from. All devices of this process share the work.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import UInt8
from PIL import Image

from lrm_jax.images import camera_paths, captures, cutout, model_input, recentre
from lrm_jax.images.camera_paths import Orbit
from lrm_jax.images.load import load_image
from lrm_jax.images.png import to_rgba, to_uint8
from lrm_jax.mesh import lattice
from lrm_jax.mesh.surface import Surface, decimated, moved, paint
from lrm_jax.mesh.texture import MAX_FACES, bake_texture
from lrm_jax.ops import cameras as ops_cameras
from lrm_jax.ops import normalization
from lrm_jax.parallel import batch_axes, messages, sharding
from lrm_jax.types import Cameras, InputError, Rendering, Views
from lrm_jax.weights import loading

CHUNK = 2**15  # points in one call of the field: suits the caches of a CPU
MAX_BATCH = 8  # images from a list that a device encodes at once
FRAMES_TOGETHER = 4  # that a device renders at once, for a family that renders views directly
RECENTERED = 0.85  # the part of the square's side that a recentred object fills, if its family has no foreground_ratio

IDENTITY = np.eye(4)
ImageLike = str | Path | Image.Image | np.ndarray


def load(weights: str | Path | None = None, *, dtype: str | None = None) -> "Model":
    """Loads a model.

    Args:
      weights: a model file of ours, a reference's checkpoint (TripoSR, OpenLRM, LVSM, Zero123, One-2-3-45), a folder with one, a
        training run ("runs/x", or "runs/x@5000" for a step), `hf:ORG/NAME`, `hf:ORG/NAME/FILE`, or None for the bundled model.
      dtype: what the model computes in: "float32", "bfloat16" or "float16". None: the model's default, float32.

    Raises:
      InputError: the file is missing, damaged, of no known family, or does not have its family's tensors; `dtype` is unknown.
    """
    return Model(*loading.load_weights(None if weights is None else str(weights), dtype))


@dataclasses.dataclass(frozen=True)
class PreparedImage:
    """An image, ready for a model."""

    rgba: np.ndarray  # uint8 [H W 4], the object cut out
    source: Views  # NumPy [1 1 S S 3], with the camera that the family assumes


class Model:
    """A model with its weights, on all devices of this process.

    Attributes:
      module: the flax module. Call it by `module.apply({"params": params}, ..., method="encode")`, see `lrm_jax.models`.
      params: its parameters, float32.
      info: what is known about it: `family`, `variant`, `path`, `training`, and what was `assumed`.
    """

    def __init__(self, module: nn.Module, params: dict, info: dict):
        self.module, self.info = module, info
        self._device_mesh = sharding.make_device_mesh(devices=jax.local_devices())
        self._everywhere = NamedSharding(self._device_mesh, PartitionSpec())
        self._params = jax.device_put(params, self._everywhere)
        self._encode = sharding.jit(
            lambda params, source: module.apply({"params": params}, source, method="encode")
        )
        self._render = sharding.jit(self._render_views, static_argnames="size")
        self._field = sharding.jit(lambda *args: self._query_points(*args)[0])
        self._query = sharding.jit(self._query_points)

    @property
    def params(self) -> dict:
        """The parameters on the first device."""
        return jax.tree.map(lambda x: x.addressable_data(0), self._params)

    @property
    def num_params(self) -> int:
        """How many numbers the parameters are."""
        return sum(x.size for x in jax.tree.leaves(self._params))

    @property
    def chunk(self) -> int:
        """How many points `query` takes at once: a multiple of the devices."""
        return -(-CHUNK // self._device_mesh.size) * self._device_mesh.size

    @property
    def normalize(self) -> str | None:
        """The world that it was trained in, for families that take posed images: `data.normalize` of its training."""
        default = getattr(self.module, "normalize", None)
        return loading.training_data(self.info["training"]).get("normalize", default)

    # -- from images

    def reconstruct(
        self,
        image: ImageLike | captures.Capture | Sequence[ImageLike],
        *,
        recenter: bool | None = None,
        remove_background: bool = False,
    ) -> "Scene | list[Scene]":
        """Reconstructs the 3D scene of an image. A list of images gives a list of scenes, in batches that all devices share.

        Args:
          image: a path, a PIL image, or an array [H W 3 or 4], uint8 or floats in [0, 1]. An alpha channel shows what the object
            is; without one, a background of one colour is removed. For families that take posed images: a folder of three or
            more with their cameras, as for `synthesize`, of which at most 32 are used; or a capture from
            `captures.read_capture` or `captures.posed_images`.
          recenter: whether to move the object to the middle and scale it to fill 85% of the image. None: as the original does.
          remove_background: cut the object out with rembg if there is no alpha channel.

        Raises:
          InputError: an image cannot be read or shows no object, cameras are bad or do not look at one point, or the model takes
            other images.
        """
        if self.reconstructs_captures or isinstance(image, captures.Capture):
            return self._reconstruct_capture(image, recenter, remove_background)
        if not isinstance(image, list | tuple):
            return self.encode([self.prepare(image, recenter, remove_background)])[0]
        prepared = [self.prepare(x, recenter, remove_background) for x in image]
        devices = self._device_mesh.size
        size = -(-len(prepared) // -(-len(prepared) // (MAX_BATCH * devices) or 1))
        size = -(-size // devices) * devices if size >= devices else size
        groups = [prepared[start : start + size] for start in range(0, len(prepared), size or 1)]
        return [scene for group in groups for scene in self.encode(group, size)]

    def prepare(
        self, image: ImageLike, recenter: bool | None = None, remove_background: bool = False
    ) -> PreparedImage:
        """Reads an image, cuts the object out, places and resizes it, on the host. Arguments and errors as in `reconstruct`."""
        self.check_takes_images()
        name = str(image) if isinstance(image, str | Path) else "the image"
        return self.place(cutout.cut_out(load_image(image), name, remove_background), recenter)

    def place(
        self, rgba: UInt8[np.ndarray, "H W 4"], recenter: bool | None = None
    ) -> PreparedImage:
        """Places and resizes an image whose object is cut out: the second half of `prepare`."""
        module, placed = self.module, rgba
        ratio = getattr(module, "foreground_ratio", None)
        if recenter and ratio is None:
            placed = recentre.recenter_foreground(rgba, RECENTERED)
        elif recenter is False and ratio is not None:
            module = module.clone(foreground_ratio=None)
        return PreparedImage(rgba, module.prepare([placed]))

    def encode(self, images: list[PreparedImage], batch_size: int | None = None) -> list["Scene"]:
        """The scenes of prepared images, as one batch, padded to `batch_size` so that a smaller last batch compiles nothing."""
        size = max(batch_size or 0, len(images))
        padded = [x.source for x in images + images[-1:] * (size - len(images))]
        source = jax.tree.map(lambda *x: np.concatenate(x), *padded)
        encoded = self.encode_views(source, size)
        return [
            Scene(
                self,
                x.rgba,
                jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], encoded),
                camera,
                to_mesh=ops_cameras.z_rotation(-90 - ops_cameras.orbit_of(camera)["azimuth_deg"]),
                to_model=IDENTITY,
                upright=IDENTITY,
            )
            for i, x in enumerate(images)
            for camera in [jax.tree.map(lambda leaf: leaf[0, 0], x.source.cameras)]
        ]

    def check_takes_images(self) -> None:
        """Raises InputError if the model does not make scenes from single images."""
        if self.reconstructs_captures:
            raise InputError(
                f"{self._name()} reconstructs from posed images: give a folder of them with `--source`, or other weights"
            )
        if not (hasattr(self.module, "prepare") and hasattr(self.module, "query")):
            raise InputError(
                f"{self._name()} renders views and makes no mesh: use `synthesize`, or weights of another family"
            )

    # -- from posed images

    @property
    def draws_views(self) -> bool:
        """Whether the model draws views from one image (Zero123)."""
        return hasattr(self.module, "prepare") and not hasattr(self.module, "query")

    @property
    def reconstructs_captures(self) -> bool:
        """Whether the model makes scenes with a surface from posed images (One-2-3-45)."""
        return hasattr(self.module, "query") and not hasattr(self.module, "prepare")

    def check_reconstructs_captures(self) -> None:
        """Raises InputError if the model does not make scenes with a surface from posed images."""
        if hasattr(self.module, "prepare"):
            raise InputError(
                f"{self._name()} reconstructs from one image: give it one, without `--source`, or weights of One-2-3-45"
            )
        if not self.reconstructs_captures:
            self.check_takes_images()

    def _reconstruct_capture(self, source, recenter, remove_background) -> "Scene":
        """`reconstruct` from posed images."""
        self.check_reconstructs_captures()
        if isinstance(source, str | Path):
            source = captures.read_capture(source, most=model_input.MAX_VIEWS)
        if not isinstance(source, captures.Capture):
            raise InputError(
                f"{self._name()} takes posed images: give a folder of them with their cameras, or `lrm_jax.posed_images`"
            )
        if recenter is not None:
            raise InputError("recenter: posed images keep their place: leave it out")
        return self.encode_capture(model_input.cut_out(source, remove_background))

    def encode_capture(self, capture: captures.Capture) -> "Scene":
        """The scene, in the capture's own world, of posed images from `model_input.cut_out`.

        Raises:
          InputError: the cameras do not look at one point.
        """
        given, to_model = model_input.source_views(capture, self.module.image_size, self.normalize)
        return Scene(
            self,
            capture.images[0],
            self.encode_views(given, 1),
            Cameras(c2w=capture.c2w[0], fxfycxcy=given.cameras.fxfycxcy[0, 0]),
            to_mesh=np.linalg.inv(to_model),
            to_model=to_model,
            upright=normalization.upright(capture.c2w),
        )

    def synthesize(
        self,
        source: str | Path | captures.Capture,
        *,
        path: str | Path | camera_paths.CameraPath = "interpolate",
        views: int | str | Sequence[int] | None = None,
        num_frames: int = 60,
        convention: str | None = None,
        together: int = FRAMES_TOGETHER,
    ) -> UInt8[np.ndarray, "N S S 3"]:
        """Renders the frames of a camera path through a scene of posed images; for families that render views directly (LVSM).

        Args:
          source: a folder with transforms.json, or with COLMAP's sparse/0 and images; or a capture from `captures.read_capture`.
          path: "interpolate", "orbit", "spiral", a transforms.json with poses in the source's world, or a `CameraPath`.
          views: how many of the images the model gets, evenly spread, or their indices. None: all, but at most 16.
          num_frames: N, unless the path determines it.
          together: frames that each device renders at once.
          convention: of the poses, one of `ops.conventions.MEANINGS`. None: the convention of their file format.

        Returns:
          N images of the model's size, on white.

        Raises:
          InputError: cameras or images are bad, the cameras do not determine the path, or the model makes meshes
            (`reconstruct`).
        """
        self.check_takes_captures()
        if not isinstance(source, captures.Capture):
            source = captures.read_capture(Path(source), views, convention)
        if not isinstance(path, camera_paths.CameraPath):
            path = camera_paths.camera_path(source, str(path), num_frames, convention)
        size = self.module.image_size
        given, to_model = model_input.source_views(source, size, self.normalize)
        encoded = self.encode_views(given, batch=1)
        along = Cameras(
            c2w=ops_cameras.move_poses(to_model, path.c2w).astype(np.float32),
            fxfycxcy=camera_paths.intrinsics_along(path, given.cameras.fxfycxcy[0]),
        )
        frames = self.render_views(encoded, along, size, together, "frames")
        return np.stack([to_uint8(frame.rgb) for frame in frames])

    def check_takes_captures(self) -> None:
        """Raises InputError if the model does not render views of scenes from posed images."""
        if self.draws_views:
            raise InputError(f"{self._name()} draws views of one image: give an image as source")
        for member, images in {"prepare": "one image", "query": "posed images"}.items():
            if hasattr(self.module, member):
                raise InputError(
                    f"{self._name()} reconstructs from {images}: use `reconstruct`, or give weights of LVSM"
                )

    # -- on the devices

    def _name(self):
        return f"{self.info['path']}: {self.info['family']}"

    def encode_views(self, source: Views, batch: int) -> Any:
        """The scene [B ...] of views [B V H W 3], on the host."""
        return self.on_devices(self._encode, source, batch)

    def on_devices(self, function: Callable, inputs: Any, count: int) -> Any:
        """`function(params, inputs)` on the host. Inputs [count ...] that do not divide over the devices go to the first one."""
        if count % self._device_mesh.size:
            return jax.device_get(function(self.params, inputs))
        split = NamedSharding(self._device_mesh, PartitionSpec(sharding.AXES))
        with jax.set_mesh(self._device_mesh):
            return jax.device_get(function(self._params, jax.device_put(inputs, split)))

    def render_views(
        self, encoded: Any, cameras: Cameras, size: int, together: int = 1, label: str = "views"
    ) -> Iterator[Rendering]:
        """Yields the views of Cameras[V] of an encoded scene [1 ...]: NumPy [size size ...], premultiplied colour.

        Args:
          together: views that each device renders at once.

        Raises:
          InputError: a view is not finite.
        """
        count, devices = len(cameras.c2w), self._device_mesh.size
        # Fewer views than devices are rendered by the first one.
        shared = count >= devices
        step = min(together, -(-count // devices)) * devices if shared else min(together, count)
        params = self._params if shared else self.params
        scene = jax.device_put(encoded, self._everywhere) if shared else encoded
        cameras = jax.tree.map(np.asarray, cameras)
        views = messages.progress(range(count), count, label)
        for view in views:
            if view % step == 0:
                # The last batch is padded with the last camera, so that nothing is compiled again.
                chosen = np.minimum(np.arange(view, view + step), count - 1)
                some = jax.tree.map(lambda x, chosen=chosen: x[chosen], cameras)
                with jax.set_mesh(self._device_mesh) if shared else contextlib.nullcontext():
                    rendered = jax.device_get(self._render(params, scene, some, size=size))
                if not np.isfinite(rendered.rgb).all():
                    raise InputError(
                        "the rendered colours are not finite: the weights are damaged, use others"
                    )
            yield jax.tree.map(lambda x, i=view % step: x[i], rendered)

    def _render_views(self, params, scene, cameras: Cameras, size: int) -> Rendering:
        def render(shared, cameras: Cameras):
            params, scene = shared
            rays = jax.tree.map(lambda x: x[None], ops_cameras.pixel_rays(cameras, size, size))
            rendering = self.module.apply({"params": params}, scene, rays, method="render")
            return jax.tree.map(lambda x: x[0].astype(jnp.float32), rendering)

        return batch_axes.split_batch(render, (params, scene), cameras)

    def query(self, encoded: Any, xyz: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Field [Q] and sRGB colour [Q 3] of an encoded scene [1 ...] at points [Q 3]; compiled once for each Q."""
        with jax.set_mesh(self._device_mesh):
            return self._query(self._params, encoded, xyz)

    def field(self, encoded: Any, xyz: np.ndarray) -> jax.Array:
        """The field [Q] alone, as `query` gives it: where views are blended, colours are most of the work."""
        with jax.set_mesh(self._device_mesh):
            return self._field(self._params, encoded, xyz)

    def _query_points(self, params, scene, xyz):
        def query(shared, xyz):
            params, scene = shared
            field, rgb = self.module.apply({"params": params}, scene, xyz[None], method="query")
            return field[0], rgb[0]

        return batch_axes.split_batch(query, (params, scene), xyz)


@dataclasses.dataclass(frozen=True)
class Scene:
    """One object, from `Model.reconstruct`. Arrays are NumPy arrays.

    Its cameras are in the model's world. After posed images, they and the mesh are in the world and unit of these.
    """

    model: Model
    image: np.ndarray  # uint8 [H W 4], the object cut out; the first one of posed images
    encoded: Any  # the family's scene [1 ...]
    camera: Cameras  # [] of the image: given, or assumed by the family
    to_mesh: np.ndarray  # [4 4] similarity from the model's world to that of the mesh
    to_model: np.ndarray  # [4 4] similarity from the world of the cameras to the model's
    # [4 4] rigid motion from the world of the cameras to one with z up and the object at the origin
    upright: np.ndarray
    views: captures.Capture | None = None  # that were drawn on the way: see `two_stage`

    def render(
        self, cameras: Orbit | Cameras | None = None, size: int = 256
    ) -> UInt8[np.ndarray, "V size size 4"]:
        """Renders views, sRGB with straight alpha.

        Args:
          cameras: `lrm_jax.orbit(...)`, or Cameras[V] in the scene's world. None: one view from the image's camera.
          size: pixels along a side.
        """
        return np.stack([to_rgba(x) for x in self.renderings(cameras, size)])

    def renderings(
        self, cameras: Orbit | Cameras | None = None, size: int = 256
    ) -> Iterator[Rendering]:
        """Yields the views of `render` as float32: premultiplied colour, alpha, and depth along the rays in world units."""
        cameras = move_cameras(self.to_model, self.cameras(cameras))
        scale = np.float32(np.linalg.norm(self.to_model[:3, 0]))
        for rendering in self.model.render_views(self.encoded, cameras, size):
            yield rendering.replace(depth=rendering.depth / scale)

    def cameras(self, cameras: Orbit | Cameras | None) -> Cameras:
        """Cameras[V] from the argument of `render`."""
        if cameras is None:
            return jax.tree.map(lambda x: x[None], self.camera)
        if isinstance(cameras, Orbit):
            return move_cameras(np.linalg.inv(self.upright), cameras.around(self.upright_camera))
        return cameras

    @property
    def upright_camera(self) -> Cameras:
        """The image's camera [] in a world with z up and the object at the origin."""
        return move_cameras(self.upright, self.camera)

    @property
    def facing(self) -> np.ndarray:
        """The rigid motion [4 4] from the mesh's world to one with z up, the object at the origin, and the camera over -y."""
        azimuth = ops_cameras.orbit_of(self.upright_camera)["azimuth_deg"]
        turn = ops_cameras.z_rotation(-90 - azimuth)
        return turn @ self.upright @ np.linalg.inv(self.to_mesh @ self.to_model)

    def mesh(
        self,
        resolution: int = 256,
        *,
        level: float | None = None,
        texture: int | None = None,
        faces: int | None = None,
        dense: bool = False,
    ):
        """The coloured mesh as a `trimesh.Trimesh` (`mesh.mesh.Mesh`), z up. The side that the image shows faces -y.

        From posed images, it is in their world and unit instead.

        Args:
          resolution: grid points along a side of the model's cube.
          level: the field's value at the surface. None: the model's.
          texture: side of a texture in texels. None: vertex colours.
          faces: the most triangles, roughly; larger meshes are decimated. None: no limit, or 20,000 with a texture.
          dense: evaluate the whole grid, not only around the surface.

        Raises:
          InputError: the field does not cross the level, or no texture could be made.
        """
        from lrm_jax.mesh.mesh import Mesh  # here: trimesh takes a second to import

        return Mesh.of(self.surface(resolution, level, texture, faces, dense))

    def surface(
        self,
        resolution: int = 256,
        level: float | None = None,
        texture_size: int | None = None,
        max_faces: int | None = None,
        dense: bool = False,
    ) -> Surface:
        """`mesh` as plain arrays."""
        module = self.model.module
        scene = jax.device_put(self.encoded, self.model._everywhere)
        options = {"chunk": self.model.chunk, "progress": messages.progress}
        level = module.surface_level if level is None else level

        def field(xyz):
            return self.model.field(scene, xyz)

        def color(xyz):
            return self.model.query(scene, xyz)[1]

        vertices, triangles = lattice.extract(
            field, resolution, module.radius, level, dense=dense, **options
        )
        if max_faces is not None and not texture_size:
            vertices, triangles = decimated(vertices, triangles, max_faces)
        found = paint(vertices, triangles, color, **options)
        if texture_size:
            limit = MAX_FACES if max_faces is None else max_faces
            found = bake_texture(found, color, texture_size, max_faces=limit, **options)
        return moved(found, self.to_mesh)


def move_cameras(motion: np.ndarray, cameras: Cameras) -> Cameras:
    """Cameras after a similarity [4 4] of their world, NumPy float64."""
    c2w = ops_cameras.move_poses(motion, np.asarray(cameras.c2w, np.float64))
    return Cameras(c2w=c2w, fxfycxcy=np.asarray(cameras.fxfycxcy))
