"""From image files to arrays and back: loading, cut-outs, crops, contact sheets, video.

Images are NumPy uint8 [H W 4], sRGB with straight alpha, until they are resized.
"""
