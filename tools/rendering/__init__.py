"""The parts of `tools/render_objects.py`, in the order in which an object passes through them.

sources.py    finds the objects in a folder or .zip, and puts a 3D file on disk with all files that it refers to
surfaces.py   3D file -> triangles in the normalised world; colours and random points of the surface
protocols.py  the numbers of LRM, OpenLRM and TripoSR -> cameras and light of an object
embree.py     triangles + cameras + light -> views, by ray casting in NumPy
cycles.py     3D file + the same cameras + the same light -> views, by Blender in a separate process,
              which runs blender_script.py
output.py     views -> files, in OpenLRM's layout
objects.py    takes one object through all of these, and writes it completely or not at all
processes.py  renders many objects in parallel; if one crashes its process, only that one fails
"""
