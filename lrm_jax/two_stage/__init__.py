"""One image to a mesh by two models, as One-2-3-45 (https://arxiv.org/abs/2306.16928): one draws views around the object, the other
reconstructs it from them.

    models = two_stage.load("one2345/")
    scene = models.reconstruct("chair.png", seed=1)
    scene.mesh().export("chair.glb")
    scene.views.images  # the 40 images

The views are those of `ops.cameras.one2345_rig`. Views 0 to 3 and the neighbours of view 0 do not depend on the elevation of the
image's camera; it is estimated from these neighbours, then the others are drawn.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from lrm_jax import api
from lrm_jax.images import captures, cutout, png
from lrm_jax.images.load import load_image
from lrm_jax.ops import cameras as ops_cameras
from lrm_jax.ops import conventions, normalization
from lrm_jax.parallel import messages, whole_files
from lrm_jax.two_stage import drawing, elevation, loftr, sift
from lrm_jax.types import Cameras, InputError, Views
from lrm_jax.weights import tensor_files

PARTS = "parts.json"  # the file that names the parts of a folder
ELEVATIONS = (-50, 60)  # of the image's camera, degrees: those that are tried, too
PROVISIONAL = 90.0  # polar angle before the elevation is known: only motions count then
# What the views are drawn from: the image, or another view.
IMAGE = -1
FIRST = (0, 1, 2, 3)
NEIGHBOURS_OF_0 = (8, 9, 10, 11)
SECOND = (4, 5, 6, 7)
OTHERS = tuple(range(12, 40))
# About how many steps of sampling the reference makes from the image, and from a view.
STEPS, STEPS_OF_NEIGHBOURS = 75, 50


def parent(view: int) -> int:
    """What a view is drawn from."""
    return IMAGE if view < 8 else (view - 8) // 4


def is_one(weights: str | Path | None) -> bool:
    """Whether weights are a folder or a file that names two models."""
    path = Path("" if weights is None else weights)
    return path.name == PARTS or (path.is_dir() and (path / PARTS).is_file())


def load(weights: str | Path, *, dtype: str | None = None) -> "TwoStage":
    """Loads both models.

    Args:
      weights: a folder with parts.json, or such a file: {"views": W, "reconstruction": W, "matcher": FILE}. The first two are weights
        as `lrm_jax.load` takes them, of Zero123 and One-2-3-45, or paths relative to the file. The matcher, which is optional, is a
        checkpoint of LoFTR; without it, SIFT matches the images whose elevation is sought.
      dtype: what the models compute in.

    Raises:
      InputError: a part is missing or of another kind.
    """
    path = Path(weights) / PARTS if Path(weights).is_dir() else Path(weights)
    parts = captures.load_json(path, path.name)
    known = {"views", "reconstruction", "matcher"}
    if not {"views", "reconstruction"} <= set(parts) <= known or not all(isinstance(x, str) for x in parts.values()):  # fmt: skip
        raise InputError(
            f'{path}: needs the names "views" and "reconstruction", and may have "matcher", each with a path or hf:ORG/NAME'
        )

    def located(name):
        beside = path.parent / name
        return str(beside) if beside.exists() else name

    views = api.load(located(parts["views"]), dtype=dtype)
    reconstruction = api.load(located(parts["reconstruction"]), dtype=dtype)
    drawing.check_draws(views)
    if not reconstruction.reconstructs_captures:
        family = reconstruction.info["family"]
        raise InputError(f"{path}: reconstruction is a model of {family}: give one of One-2-3-45")
    matcher = None
    if "matcher" in parts:
        matcher = read_matcher(Path(located(parts["matcher"])))
    return TwoStage(views, reconstruction, matcher)


def read_matcher(path: Path) -> dict:
    """LoFTR's parameters. Raises InputError if it is not its checkpoint."""
    content, _ = tensor_files.read(path)
    try:
        return loftr.from_torch(content.get("state_dict", content))
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: not a checkpoint of LoFTR ({error}): give indoor_ds_new.ckpt, or leave the matcher out"
        ) from error


@dataclasses.dataclass
class Drawn:
    """The views so far. Each is also a file, if there is a folder."""

    origin: dict  # what decides the views: image, models, seed, steps
    folder: Path | None
    images: dict[int, UInt8[np.ndarray, "S S 3"]] = dataclasses.field(default_factory=dict)
    redrawn: dict[str, int] = dataclasses.field(default_factory=dict)  # how often, by view
    elevation: dict = dataclasses.field(
        default_factory=dict
    )  # degrees and status; {}: not yet known

    def keep(self, view: int, image: np.ndarray) -> None:
        """Adds a view."""
        self.images[view] = image
        if self.folder is not None:
            whole_files.write_file(self.folder / f"{view:03}.png", png.png(image))

    def note(self) -> None:
        """Writes what is known besides the images."""
        if self.folder is not None:
            text = json.dumps({"origin": self.origin, "redrawn": self.redrawn, "elevation": self.elevation}, indent=2)  # fmt: skip
            whole_files.write_file(self.folder / "views.json", text.encode())

    def drop(self, views: Iterable[int]) -> None:
        """Forgets views, to draw them again."""
        for view in views:
            self.images.pop(view, None)
            if self.folder is not None:
                (self.folder / f"{view:03}.png").unlink(missing_ok=True)


def resume(folder: Path | None, origin: dict) -> Drawn:
    """The views that a folder has, if they are of the same origin; otherwise none."""
    drawn = Drawn(origin, folder)
    if folder is not None and (folder / "views.json").is_file():
        known = captures.load_json(folder / "views.json", "views.json")
        if known.get("origin") == origin:
            drawn.redrawn, drawn.elevation = known["redrawn"], known["elevation"]
            for view in range(40):
                path = folder / f"{view:03}.png"
                if path.is_file():
                    drawn.images[view] = load_image(path)[..., :3]
            return drawn
        drawn.drop(range(40))
    drawn.note()
    return drawn


class TwoStage:
    """A model that draws views of an object, and one that reconstructs it from them.

    Attributes:
      drawing, reconstruction: `api.Model`s of Zero123 and One-2-3-45.
      matcher: the parameters of LoFTR; None: SIFT.
      say: is called with a line when something begins that may take long.
    """

    def __init__(self, drawing: api.Model, reconstruction: api.Model, matcher: dict | None = None):
        self.drawing, self.reconstruction, self.matcher = drawing, reconstruction, matcher
        self.say: Callable[[str], None] = lambda message: None
        self._programs: dict[int, drawing.Program] = {}

    @property
    def info(self) -> dict:
        """What is known about the models."""
        matcher = "sift" if self.matcher is None else "loftr"
        return {"views": self.drawing.info, "reconstruction": self.reconstruction.info, "matcher": matcher}  # fmt: skip

    @property
    def num_params(self) -> int:
        """How many numbers the parameters of both are."""
        return self.drawing.num_params + self.reconstruction.num_params

    def reconstruct(
        self,
        image: api.ImageLike,
        *,
        elevation: float | None = None,
        seed: int = 0,
        redraw: Iterable[int] = (),
        steps: int | None = None,
        folder: str | Path | None = None,
        remove_background: bool = False,
    ) -> api.Scene:
        """Reconstructs the object of an image.

        Args:
          image: as for `Model.reconstruct`.
          elevation: of the image's camera, degrees above the horizon, -50 to 60. None: it is estimated.
          seed: of the views. Each has its own random numbers, whatever the others are.
          redraw: numbers of views to draw once more, with other random numbers, and with them those drawn from them.
          steps: of sampling, about. None: 75 from the image and 50 from a view, as the reference.
          folder: keeps the views and the elevation as they come. Those that it has from the same image, models, seed and steps are
            not drawn again.

        Returns:
          The scene, z up, whose `views` are the 40 images. Its cameras are those of `ops.cameras.one2345_rig`.

        Raises:
          InputError: the image cannot be used, or its elevation cannot be found.
        """
        name = str(image) if isinstance(image, str | Path) else "the image"
        rgba = cutout.cut_out(load_image(image), name, remove_background)
        prepared = self.drawing.place(rgba)
        rgb = np.asarray(prepared.source.rgb[0, 0])
        low, high = ELEVATIONS
        if elevation is not None and not low <= elevation <= high:
            raise InputError(f"elevation {elevation} is out of range: choose {low} to {high}")
        origin = {
            "image": hashlib.sha256(rgb.tobytes()).hexdigest()[:16],
            "model": digest(self.drawing.params),
            "seed": seed,
            "steps": steps,
        }
        drawn = resume(None if folder is None else Path(folder), origin)
        self._redraw(drawn, set(redraw))
        self._draw(drawn, rgb, FIRST, PROVISIONAL, seed, steps or STEPS)
        self._draw(drawn, rgb, NEIGHBOURS_OF_0, PROVISIONAL, seed, steps or STEPS_OF_NEIGHBOURS)
        polar = 90 - self._elevation(drawn, elevation)
        self._draw(drawn, rgb, SECOND, polar, seed, steps or STEPS)
        self._draw(drawn, rgb, OTHERS, polar, seed, steps or STEPS_OF_NEIGHBOURS)
        self.say("encode 32 views")
        rig = ops_cameras.one2345_rig(polar)
        if drawn.folder is not None:
            write_poses(drawn.folder, rig)
        return self._scene(prepared, [drawn.images[view] for view in range(40)], rig)

    def _redraw(self, drawn: Drawn, views: set[int]) -> None:
        if wrong := [view for view in views if not 0 <= view < 40]:
            raise InputError(f"view {wrong[0]} cannot be drawn again: choose 0 to 39")
        for view in views:
            drawn.redrawn[str(view)] = drawn.redrawn.get(str(view), 0) + 1
        again = views | {view for view in range(8, 40) if parent(view) in views}
        drawn.drop(again)
        if again & set(NEIGHBOURS_OF_0):
            drawn.elevation = {}
        if again:
            drawn.note()

    def _elevation(self, drawn: Drawn, given: float | None) -> float:
        """The elevation in degrees: given, known, or estimated."""
        known = drawn.elevation
        if given is not None:
            new = {"degrees": float(given), "status": "given"}
        elif known.get("status") == "found":
            new = known
        else:
            self.say("estimate the elevation")
            images = np.stack([drawn.images[view] for view in NEIGHBOURS_OF_0])
            with_loftr = self.matcher is not None
            found = loftr.matches(self.matcher, images) if with_loftr else sift.matches(images)
            found = elevation.on_foreground(found, elevation.off_white(images))
            result = elevation.estimate(found)
            new = {"degrees": result.degrees, "status": result.status}
        # Views below view 0 are drawn where it is high, views above where it is low.
        if known.get("degrees") is not None and (known["degrees"] >= 15) != ((new["degrees"] or 0) >= 15):  # fmt: skip
            drawn.drop(view for view in range(4, 40) if view in SECOND or parent(view) in SECOND)
        drawn.elevation = new
        drawn.note()
        if new["status"] not in ("given", "found"):
            guess = "" if new["degrees"] is None else f", perhaps {new['degrees']:.0f} degrees"
            raise InputError(
                f"the elevation of its camera is unclear ({new['status']}{guess}): give it with --elevation"
            )
        return new["degrees"]

    def _draw(self, drawn: Drawn, rgb, views: tuple[int, ...], polar: float, seed, steps) -> None:
        """Draws those of the views that are missing."""
        missing = [view for view in views if view not in drawn.images]
        if not missing:
            return
        rig = ops_cameras.one2345_rig(polar)
        program = self._program(steps)
        together = drawing.together()
        batches = [missing[start : start + together] for start in range(0, len(missing), together)]
        label = f"views {views[0]} to {views[-1]}"
        self.say(f"draw {len(missing)} of {label}, in about {steps} steps")
        for batch in messages.progress(batches, len(batches), label):
            full = batch + batch[-1:] * (together - len(batch))  # so that nothing is compiled again
            parents = [parent(view) for view in full]
            sources = [rgb if i == IMAGE else input_of(drawn.images[i]) for i in parents]
            keys = [view_key(seed, view, drawn.redrawn.get(str(view), 0)) for view in full]
            # The image has the camera of view 0.
            given = Views(np.stack(sources)[:, None], at(rig, np.maximum(parents, 0)))
            images = program(given, at(rig, full), jnp.stack(keys))
            for view, image in zip(batch, drawing.truncated(images), strict=False):
                drawn.keep(view, image)

    def _program(self, steps: int) -> drawing.Program:
        if steps not in self._programs:
            self._programs[steps] = drawing.program(self.drawing, steps)
        return self._programs[steps]

    def _scene(self, prepared, images: list[np.ndarray], rig: Cameras) -> api.Scene:
        """The scene of all views, in the rig's world."""
        model = self.reconstruction
        size = model.module.image_size
        resized = np.stack([captures.crop(image, size)[0] for image in images[8:]])
        # Parity: view 0 decides the world, too, though it is not given.
        chosen = np.array([0, *range(8, 40)])
        c2w, fxfycxcy = rig.c2w.astype(float), rig.fxfycxcy
        to_model = normalization.sources_motion(c2w[chosen], fxfycxcy[chosen], model.normalize)
        moved = ops_cameras.move_poses(to_model, c2w[8:]).astype(np.float32)
        given = Views(resized.astype(np.float32) / 255, Cameras(moved, fxfycxcy[8:]))
        camera = Cameras(c2w[0], fxfycxcy[0])
        turn = ops_cameras.z_rotation(-90 - ops_cameras.orbit_of(camera)["azimuth_deg"])
        return api.Scene(
            model,
            prepared.rgba,
            model.encode_views(jax.tree.map(lambda x: x[None], given), 1),
            camera,
            to_mesh=turn @ np.linalg.inv(to_model),
            to_model=to_model,
            upright=api.IDENTITY,
            views=captures.posed_images(images, c2w, fxfycxcy),
        )


def digest(params: dict) -> str:
    """Tells models apart by the first numbers of each parameter."""
    found = hashlib.sha256()
    for x in jax.tree.leaves(params):
        found.update(np.asarray(x.ravel()[:16]).tobytes())
    return found.hexdigest()[:16]


def at(rig: Cameras, views) -> Cameras:
    """Cameras [N 1] of views."""
    return jax.tree.map(lambda x: x[np.asarray(views)][:, None], rig)


def view_key(seed: int, view: int, redrawn: int) -> jax.Array:
    """The random key of a view."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), view), redrawn)


def input_of(image: UInt8[np.ndarray, "S S 3"]) -> np.ndarray:
    """A drawn view as the image of others: nearly white pixels become white, floats in [0, 1]."""
    # Parity: each channel by itself.
    return np.where(image >= 253, 1.0, image / 255).astype(np.float32)


def write_poses(folder: Path, rig: Cameras) -> None:
    """Makes a folder of views one that `lrm reconstruct --source` reads: the 32 views that the reconstruction is given."""
    poses = conventions.write(rig.c2w.astype(float), captures.TRANSFORMS_CONVENTION).tolist()
    angle = float(2 * np.arctan(0.5 / rig.fxfycxcy[0, 0]))
    frames = [{"file_path": f"{view:03}.png", "transform_matrix": poses[view]} for view in range(8, 40)]  # fmt: skip
    text = json.dumps({"camera_angle_x": angle, "frames": frames}, indent=1)
    whole_files.write_file(folder / "transforms.json", text.encode())
