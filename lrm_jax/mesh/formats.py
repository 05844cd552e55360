"""Mesh files: `.glb`, `.obj`, `.ply`.

Vertices are in the world of `types.py`: right-handed, z up. The files are written so that common programs show z as up:

| file | axes | colours | opens upright in |
| --- | --- | --- | --- |
| `.glb` | y up, as glTF requires: (x, y, z) is written as (x, z, -y) | linear floats (COLOR_0), or an sRGB PNG | every glTF viewer, Blender |
| `.obj` | y up, by the same rotation | sRGB after the position (`v x y z r g b`), or `.mtl` and `.png` | Blender's default import, MeshLab |
| `.ply` | z up: the world's own axes, for measurements | sRGB bytes | Blender's default import; MeshLab shows y up |
"""

import json
import struct

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from lrm_jax.images.png import png
from lrm_jax.mesh.surface import Surface
from lrm_jax.ops import srgb

FORMATS = ("glb", "obj", "ply")
LINES = 2**16  # lines of text formatted at once


def write(surface: Surface, kind: str, name: str = "mesh") -> dict[str, bytes]:
    """The files of a mesh in one of FORMATS: {file name: content}. The first is `name` with the format as its suffix."""
    if kind == "obj":
        return to_obj(surface, name)
    return {f"{name}.{kind}": to_glb(surface) if kind == "glb" else to_ply(surface)}


def to_glb(surface: Surface) -> bytes:
    """A binary glTF 2.0 file (https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html): y up, matte, double-sided.

    It has the texture if there is one, otherwise vertex colours. These are written as floats, because glTF expects linear
    vertex colours, and linear bytes lose the dark tones of sRGB bytes.
    """
    attributes = {"POSITION": _y_up(surface.vertices), "NORMAL": _y_up(surface.normals)}
    shading = {"metallicFactor": 0.0, "roughnessFactor": 1.0}
    tree = {
        "asset": {"version": "2.0", "generator": "lrm_jax"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": "mesh"}],
        "materials": [{"pbrMetallicRoughness": shading, "doubleSided": True}],
    }
    images = []
    if surface.texture is None:
        attributes["COLOR_0"] = _linear(surface.colors)
    else:
        attributes["TEXCOORD_0"] = surface.uv
        images = [png(surface.texture)]
        shading["baseColorTexture"] = {"index": 0}
        tree["textures"] = [{"source": 0, "sampler": 0}]
        tree["samplers"] = [{"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}]
        tree["images"] = [{"bufferView": len(attributes) + 1, "mimeType": "image/png"}]

    last = len(attributes)  # the index of the faces' accessor and buffer view
    primitive = {
        "attributes": {name: i for i, name in enumerate(attributes)},
        "indices": last,
        "material": 0,
    }
    tree["meshes"] = [{"primitives": [primitive]}]
    tree["accessors"] = [
        {
            "bufferView": i,
            "componentType": 5126,
            "count": len(values),
            "type": f"VEC{values.shape[1]}",
        }
        for i, values in enumerate(attributes.values())
    ]
    low, high = attributes["POSITION"].min(0), attributes["POSITION"].max(0)
    tree["accessors"][0] |= {"min": low.tolist(), "max": high.tolist()}
    tree["accessors"].append(
        {"bufferView": last, "componentType": 5125, "count": surface.faces.size, "type": "SCALAR"}
    )
    buffers = [np.asarray(values, "<f4").tobytes() for values in attributes.values()]
    return _pack_glb(tree, [*buffers, surface.faces.astype("<u4").tobytes(), *images])


def _pack_glb(tree: dict, buffers: list[bytes]) -> bytes:
    """The .glb container: the JSON tree, with a view for each buffer, then the buffers, each padded to four bytes."""
    body = b""
    tree["bufferViews"] = []
    for data in buffers:
        tree["bufferViews"].append({"buffer": 0, "byteOffset": len(body), "byteLength": len(data)})
        body += data + b"\0" * (-len(data) % 4)
    tree["buffers"] = [{"byteLength": len(body)}]
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    chunks += struct.pack("<I4s", len(body), b"BIN\0") + body
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def to_obj(surface: Surface, name: str = "mesh") -> dict[str, bytes]:
    """A Wavefront .obj file, y up, and, if there is a texture, its .mtl and .png: {file name: content}.

    Without a texture, sRGB colours follow the positions. Most programs read them there, though the format's manual does not
    mention them.
    """
    positions, normals = _y_up(surface.vertices), _y_up(surface.normals)
    corners = surface.faces + 1
    if surface.texture is None:
        colored = np.concatenate([positions, surface.colors / 255], -1)
        body = _lines("v %.6f %.6f %.6f %.4f %.4f %.4f\n", colored)
        body += _lines("vn %.4f %.4f %.4f\n", normals)
        body += _lines("f %d//%d %d//%d %d//%d\n", corners.repeat(2, -1))
        return {f"{name}.obj": body.encode()}
    body = f"mtllib {name}.mtl\nusemtl {name}\n"
    body += _lines("v %.6f %.6f %.6f\n", positions) + _lines("vn %.4f %.4f %.4f\n", normals)
    body += _lines("vt %.6f %.6f\n", surface.uv * [[1, -1]] + [[0, 1]])
    body += _lines("f %d/%d/%d %d/%d/%d %d/%d/%d\n", corners.repeat(3, -1))
    material = f"newmtl {name}\nKa 0 0 0\nKd 1 1 1\nKs 0 0 0\nmap_Kd {name}.png\n"
    files = {f"{name}.obj": body.encode(), f"{name}.mtl": material.encode()}
    return files | {f"{name}.png": png(surface.texture)}


def to_ply(surface: Surface) -> bytes:
    """A binary .ply file in the world's own axes, z up, with sRGB vertex colours."""
    properties = [(name, "<f4") for name in ("x", "y", "z", "nx", "ny", "nz")]
    properties += [(name, "u1") for name in ("red", "green", "blue")]
    vertices = np.empty(len(surface.vertices), properties)
    columns = np.concatenate([surface.vertices, surface.normals, surface.colors], -1)
    for (name, _), column in zip(properties, columns.T, strict=True):
        vertices[name] = column
    faces = np.empty(len(surface.faces), [("count", "u1"), ("indices", "<i4", 3)])
    faces["count"], faces["indices"] = 3, surface.faces
    lines = [
        "ply",
        "format binary_little_endian 1.0",
        "comment lrm_jax, z up",
        f"element vertex {len(vertices)}",
    ]
    lines += [
        f"property {'uchar' if kind == 'u1' else 'float'} {name}" for name, kind in properties
    ]
    lines += [
        f"element face {len(faces)}",
        "property list uchar int vertex_indices",
        "end_header",
        "",
    ]
    return "\n".join(lines).encode() + vertices.tobytes() + faces.tobytes()


def _y_up(xyz: Float32[np.ndarray, "N 3"]) -> Float32[np.ndarray, "N 3"]:
    return np.stack([xyz[:, 0], xyz[:, 2], -xyz[:, 1]], -1)


def _linear(colors: UInt8[np.ndarray, "N 3"]) -> Float32[np.ndarray, "N 3"]:
    return srgb.to_linear(np.arange(256) / 255).astype(np.float32)[colors]


def _lines(form: str, rows: Float[np.ndarray, "N C"] | Int[np.ndarray, "N C"]) -> str:
    """`form` % row for each row, many rows at a time because one by one is slow."""
    groups = [rows[start : start + LINES] for start in range(0, len(rows), LINES)]
    return "".join(form * len(group) % tuple(group.ravel().tolist()) for group in groups)
