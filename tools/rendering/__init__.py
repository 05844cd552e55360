"""The parts of `tools/render_objects.py`, in the order in which an object passes through them.

sources.py    which objects a folder or .zip has, and a 3D file with everything it refers to on disk
surfaces.py   3D file -> triangles in the normalised world; colour at, and random points on, the surface
protocols.py  the numbers of LRM, OpenLRM and TripoSR -> cameras and light of an object
embree.py     triangles + cameras + light -> views, by ray casting in NumPy
cycles.py     3D file + the same cameras + the same light -> views, by Blender in a process of its own,
              which runs blender_script.py
output.py     views -> files, in OpenLRM's layout
objects.py    one object through all of these, whole or not at all
processes.py  many objects at a time; one that brings its process down fails alone
"""
