"""A coloured mesh as a trimesh object: what `Scene.mesh` returns."""

import os
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image
from trimesh.visual import ColorVisuals, TextureVisuals
from trimesh.visual.material import PBRMaterial

from lrm_jax.mesh import formats
from lrm_jax.mesh.surface import Surface
from lrm_jax.parallel import whole_files


class Mesh(trimesh.Trimesh):
    """A `trimesh.Trimesh` in a world with z up, with vertex colours or a texture.

    It writes `.glb`, `.obj` and `.ply` files by `mesh.formats`, upright and in the right colours: trimesh itself writes sRGB
    where glTF expects linear colours, and does not turn the up axis. Everything else is trimesh's.
    """

    @classmethod
    def of(cls, surface: Surface) -> "Mesh":
        """The surface as a trimesh object; nothing is merged or reordered."""
        if surface.texture is None:
            visual = ColorVisuals(vertex_colors=surface.colors)
        else:
            material = PBRMaterial(
                baseColorTexture=Image.fromarray(surface.texture),
                metallicFactor=0.0,
                roughnessFactor=1.0,
                doubleSided=True,
            )
            # In trimesh, v points up.
            visual = TextureVisuals(uv=surface.uv * [1, -1] + [0, 1], material=material)
        return cls(
            surface.vertices,
            surface.faces,
            vertex_normals=surface.normals,
            visual=visual,
            process=False,
        )

    def surface(self) -> Surface:
        """The mesh in its present state, as `mesh.formats` writes it."""
        uv = texture = None
        visual = self.visual
        if isinstance(visual, TextureVisuals) and visual.uv is not None:
            image = (
                visual.material.to_pbr() if hasattr(visual.material, "to_pbr") else visual.material
            )
            texture = np.asarray(image.baseColorTexture.convert("RGB"))
            uv = (visual.uv * [1, -1] + [0, 1]).astype(np.float32)
            colors = np.full((len(self.vertices), 3), 255, np.uint8)
        else:
            colors = np.asarray(visual.vertex_colors)[:, :3]
        return Surface(
            self.vertices.astype(np.float32),
            self.faces.astype(np.int32),
            colors,
            self.vertex_normals.astype(np.float32),
            uv,
            texture,
        )

    def export(self, file_obj=None, file_type=None, **options):
        """Writes a file, whole or not at all, in the format of its suffix; or returns its content. Like `Trimesh.export`."""
        is_path = isinstance(file_obj, str | os.PathLike)
        kind = file_type or (Path(file_obj).suffix if is_path else "")
        kind = kind.lower().removeprefix(".")
        if kind not in formats.FORMATS or options or not (is_path or file_obj is None):
            return super().export(file_obj, file_type, **options)
        files = formats.write(self.surface(), kind, Path(file_obj).stem if is_path else "mesh")
        if is_path:
            path = Path(file_obj)
            first, *beside = files
            files = {path.name: files[first]} | {name: files[name] for name in beside}
            whole_files.write_files(path.parent, files)
        return next(iter(files.values()))
