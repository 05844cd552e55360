"""How high above the horizon the camera of an image stood, from images that a model drew around it."""
