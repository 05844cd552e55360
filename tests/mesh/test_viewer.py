"""The contents of the viewer page, tested without a browser."""

import base64
import html.parser
import json
import re
import struct

import numpy as np
import pytest

from lrm_jax.mesh import formats, surface, viewer

GLB = b"glTF" + bytes(range(256)) + b"</script>"


class Page(html.parser.HTMLParser):
    """Parses a page like a browser: the elements with their attributes and text."""

    def __init__(self, page: bytes):
        super().__init__()
        self.elements, self.inside = [], None
        self.feed(page.decode())
        self.close()

    def handle_starttag(self, tag, attributes):
        self.inside = {"tag": tag, "text": "", **dict(attributes)}
        self.elements.append(self.inside)

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.inside["text"] += data

    def of(self, tag: str) -> list[dict]:
        return [element for element in self.elements if element["tag"] == tag]


def test_the_glb_is_inside_byte_for_byte():
    for length in (len(GLB) - 1, len(GLB), len(GLB) + 1):  # every padding
        glb = GLB.ljust(length, b"\0")[:length]
        program, data = Page(viewer.viewer_html(glb, "a", 3, 40.0)).of("script")
        assert data["id"] == "glb" and data["type"] == "text/plain"
        assert base64.b64decode(data["text"], validate=True) == glb
        assert "type" not in program


def test_opens_in_front_of_the_object_at_the_distance_asked_for():
    program, _ = Page(viewer.viewer_html(GLB, "a", distance=3, fov_y_deg=37.5)).of("script")
    (start,) = re.findall(r"START = {(.*)};", program["text"])
    assert "azimuth: 0," in start and "distance: 3.0," in start and "[0, 0, 0]" in start
    assert "FOV_Y = 37.5 *" in program["text"]


@pytest.mark.parametrize(
    "name",
    ["<a & $GLB>", "</title><script>alert(1)</script>", "\"'`${1}\\", "&amp; ü 木  $NAME $NONE"],
)
def test_any_name_is_shown_unchanged(name):
    plain = Page(viewer.viewer_html(GLB, "plain", 3, 40.0))
    page = Page(viewer.viewer_html(GLB, name, 3, 40.0))
    tags = [element["tag"] for element in page.elements]
    assert tags == [element["tag"] for element in plain.elements]
    assert page.of("title")[0]["text"] == page.of("b")[0]["text"] == name
    assert page.of("canvas")[0]["aria-label"] == f"3D model: {name}"
    # The program reads the name from the title, so the name need not be quoted for JavaScript.
    assert page.of("script")[0] == plain.of("script")[0]


def test_a_file_name_that_is_not_utf8_makes_a_page():
    name = b"caf\xe9".decode(errors="surrogateescape")
    assert b"<title>caf?</title>" in viewer.viewer_html(GLB, name, 3, 40.0)


def test_the_page_loads_nothing_from_outside():
    page = Page(viewer.viewer_html(GLB, "a", 3, 40.0))
    (policy,) = [e["content"] for e in page.of("meta") if "http-equiv" in e]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'"
    assert rules.pop("style-src") == rules.pop("script-src") == "'unsafe-inline'"
    assert not rules
    for element in page.elements:
        assert element["tag"] not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "action", "data", "srcset"} & element.keys()
    text = "".join(element["text"] for element in page.elements)
    assert not re.search(
        r"https?:|wss?:|@import|url\(|\bfetch\(|\bimport\b|XMLHttpRequest|WebSocket|sendBeacon",
        text,
    )


def test_the_program_finds_the_elements_that_it_asks_for():
    page = Page(viewer.viewer_html(GLB, "a", 3, 40.0))
    ids = [element["id"] for element in page.elements if "id" in element]
    program = page.of("script")[0]["text"]
    asked = set(re.findall(r'byId\("(\w+)"\)', program)) | {"colors", "shading"}
    assert len(ids) == len(set(ids)) and asked <= set(ids)
    (canvas,) = page.of("canvas")
    assert canvas["tabindex"] == "0" and canvas["aria-describedby"] in ids
    # The program sets everything that the shader declares.
    (names,) = re.findall(r"const names = (\[.*\]);", program)
    declared = re.findall(r"uniform \w+ ([^;]*);", program)
    declared = {name for line in declared for name in line.split(", ")} - {"image"}
    assert declared == set(json.loads(names))


@pytest.mark.parametrize("textured", [False, True])
def test_the_program_reads_what_our_glb_has(textured):
    uv = np.array([[0, 0], [1, 0], [0, 1]], np.float32)
    triangle = surface.Surface(
        vertices=np.eye(3, dtype=np.float32),
        faces=np.array([[0, 1, 2]], np.int32),
        colors=np.full((3, 3), 128, np.uint8),
        normals=np.full((3, 3), 3**-0.5, np.float32),
        uv=uv if textured else None,
        texture=np.zeros((4, 4, 3), np.uint8) if textured else None,
    )
    glb = formats.to_glb(triangle)
    (length,) = struct.unpack_from("<I", glb, 12)
    tree = json.loads(glb[20 : 20 + length])
    program = Page(viewer.viewer_html(glb, "a", 3, 40.0)).of("script")[0]["text"]
    (read,) = re.findall(r'(\["POSITION".*?\])\.forEach', program)
    (mesh,) = tree["meshes"]
    (primitive,) = mesh["primitives"]
    assert set(primitive["attributes"]) <= set(json.loads(read))
    # gl.FLOAT without gaps and gl.UNSIGNED_INT, each alone in its buffer view
    kinds = [tree["accessors"][i]["componentType"] for i in primitive["attributes"].values()]
    assert set(kinds) == {5126} and tree["accessors"][primitive["indices"]]["componentType"] == 5125
    assert not any("byteOffset" in accessor for accessor in tree["accessors"])
    assert not any("byteStride" in view for view in tree["bufferViews"])
    assert len(tree.get("images", [])) == textured
