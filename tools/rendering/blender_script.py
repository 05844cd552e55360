"""Runs inside Blender's Python (bpy 4.2 or later): renders one 3D file. `blender_script.py JOB.json`.

JOB.json has
    file        path of the .glb, .gltf, .obj or .ply
    centre, scale   the file's world with z up -> the normalised one: (xyz - centre) * scale
    c2w         [V 4 4] camera to world, Blender's axes (x right, y up, z backward), normalised world
    focal       focal length in widths of the (square) image
    size        height and width in pixels
    samples     samples per pixel
    threads     number of threads
    light       direction, sun, sky and above, see `protocols.Lighting`
    geometry    whether to write depth and normals
    out         folder to write to

For each view it writes 000.png (sRGB, straight alpha) and, with geometry, 000.exr. The latter has the channels Depth.Z (along the optical
axis) and Normal.X, Y, Z (in the world), for the rays through the pixels' centres. Then it prints a line "finished view 0".

This file imports nothing from lrm_jax or tools: Blender's environment has only bpy and NumPy.
"""

import json
import math
import signal
import sys
from pathlib import Path

# Ctrl-C ends this process at once. With Python's exception, Blender would only print a notice while it starts, and would finish
# the current image first.
signal.signal(signal.SIGINT, signal.SIG_DFL)

import bpy  # noqa: E402
import mathutils  # noqa: E402


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    bpy.ops.wm.read_factory_settings(use_empty=True)
    for addon in ("cycles", "io_scene_gltf2"):
        bpy.ops.preferences.addon_enable(module=addon)
    scene = bpy.context.scene
    import_file(job["file"])
    normalise(scene, job["centre"], job["scale"])
    add_light(scene, job["light"])
    camera = add_camera(scene, job["focal"])
    set_up(scene, job)
    for index, c2w in enumerate(job["c2w"]):
        camera.matrix_world = mathutils.Matrix(c2w)
        render(scene, job, f"{job['out']}/{index:03d}")
        print(f"finished view {index}", flush=True)


def import_file(path: str) -> None:
    """Imports a file. Blender's importers turn y up into z up like `surfaces.load_triangles`: (x, y, z) -> (x, -z, y)."""
    suffix = Path(path).suffix.lower()
    if suffix in (".glb", ".gltf"):
        bpy.ops.import_scene.gltf(filepath=path)
    else:
        read = bpy.ops.wm.obj_import if suffix == ".obj" else bpy.ops.wm.ply_import
        read(filepath=path, forward_axis="NEGATIVE_Z", up_axis="Y")
    for thing in bpy.data.objects:
        if thing.type == "MESH":
            show_colors(thing.data)
        else:
            thing.hide_render = True  # such as the file's own lights


def show_colors(mesh) -> None:
    """Shows the vertex colours of a mesh without a material. Blender reads them but does not show them."""
    colors = mesh.color_attributes
    if mesh.materials or not colors:
        return
    material = bpy.data.materials.new("vertex colours")
    material.use_nodes = True
    nodes = material.node_tree.nodes
    source = nodes.new("ShaderNodeVertexColor")
    source.layer_name = colors[0].name
    shader = next(node for node in nodes if node.type == "BSDF_PRINCIPLED")
    material.node_tree.links.new(source.outputs["Color"], shader.inputs["Base Color"])
    mesh.materials.append(material)


def normalise(scene, centre: list, scale: float) -> None:
    root = bpy.data.objects.new("normalised", None)
    scene.collection.objects.link(root)
    for thing in list(scene.objects):
        if thing.parent is None and thing is not root:
            thing.parent = root
    shift = mathutils.Matrix.Translation([-scale * x for x in centre])
    root.matrix_world = shift @ mathutils.Matrix.Scale(scale, 4)


def add_light(scene, light: dict) -> None:
    """Adds a sun and a sky. Without shadows, a white matt surface reflects what `protocols.Lighting` describes."""
    lamp = bpy.data.lights.new("sun", "SUN")
    lamp.energy = (
        math.pi * light["sun"]
    )  # this is the irradiance, and a matt surface reflects 1 / pi of it
    sun = bpy.data.objects.new("sun", lamp)
    # A sun shines along its -z axis.
    sun.rotation_euler = mathutils.Vector(light["direction"]).to_track_quat("Z", "Y").to_euler()
    scene.collection.objects.link(sun)

    # The radiance is sky + 1.5 above z. Its irradiance on a plane with normal n is pi (sky + above n_z).
    world = scene.world = bpy.data.worlds.new("sky")
    world.use_nodes = True
    nodes, links = world.node_tree.nodes, world.node_tree.links
    background = next(node for node in nodes if node.type == "BACKGROUND")
    background.inputs["Color"].default_value = (1, 1, 1, 1)
    direction, parts = nodes.new("ShaderNodeTexCoord"), nodes.new("ShaderNodeSeparateXYZ")
    line = nodes.new("ShaderNodeMath")
    line.operation = "MULTIPLY_ADD"
    line.inputs[1].default_value, line.inputs[2].default_value = 1.5 * light["above"], light["sky"]
    links.new(direction.outputs["Generated"], parts.inputs[0])
    links.new(parts.outputs["Z"], line.inputs[0])
    links.new(line.outputs[0], background.inputs["Strength"])


def add_camera(scene, focal: float):
    data = bpy.data.cameras.new("camera")
    data.sensor_fit, data.sensor_width = "HORIZONTAL", 32
    data.lens = 32 * focal
    data.clip_start, data.clip_end = 0.001, 100
    scene.camera = bpy.data.objects.new("camera", data)
    scene.collection.objects.link(scene.camera)
    return scene.camera


def set_up(scene, job: dict) -> None:
    """Sets what the image and the geometry of a view share."""
    settings = scene.render
    settings.engine = "CYCLES"
    settings.resolution_x = settings.resolution_y = job["size"]
    settings.resolution_percentage = 100
    settings.film_transparent = True
    settings.dither_intensity = 0
    settings.use_persistent_data = True  # so that later views need not build the scene again
    settings.threads_mode, settings.threads = "FIXED", job["threads"]
    scene.cycles.device = "CPU"
    scene.cycles.use_denoising = False
    scene.cycles.use_adaptive_sampling = False
    scene.view_settings.view_transform = "Standard"  # plain sRGB: the default changes the contrast
    layer = scene.view_layers[0]
    layer.use_pass_z = layer.use_pass_normal = job["geometry"]


def render(scene, job: dict, stem: str) -> None:
    write(scene, f"{stem}.png", "PNG", "RGBA", "8", job["samples"], filter_width=1.5)
    if job["geometry"]:
        # Cycles keeps the depth of the first sample, so this takes one sample, at the pixel's centre.
        write(scene, f"{stem}.exr", "OPEN_EXR_MULTILAYER", "RGBA", "32", 1, filter_width=0.01)


def write(scene, path, file_format, color_mode, color_depth, samples, filter_width) -> None:
    image = scene.render.image_settings
    if hasattr(image, "media_type"):  # Blender 5
        image.media_type = "IMAGE" if file_format == "PNG" else "MULTI_LAYER_IMAGE"
    image.file_format, image.color_mode, image.color_depth = file_format, color_mode, color_depth
    if file_format == "OPEN_EXR_MULTILAYER":
        image.exr_codec = "NONE"
    scene.cycles.samples, scene.cycles.filter_width = samples, filter_width
    scene.render.filepath = path
    bpy.ops.render.render(write_still=True)


if __name__ == "__main__":
    main(sys.argv[1])
