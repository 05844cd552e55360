"""Times PyTorch on the products that make the planes of an OpenLRM variant, to compare with "encode" of tools/bench.py.

    pip install torch
    python tools/bench_torch.py [VARIANT ...]

This is the closest PyTorch code: the blocks of the image encoder and of the transformer at their sizes, with random weights,
`scaled_dot_product_attention`, and q, k and v in one product. It has no patch embedding and no upsampling, which are under 1 % of the
operations. It runs on a GPU in 16 bits if torch finds one, otherwise on the CPU. The rate is that of torch's plain products, timed in
turn with the blocks. Times are medians of eight.
"""

import argparse

import bench
import torch
import torch.nn.functional as F

from lrm_jax import models

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def main() -> None:
    """Prints one line per variant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "variants",
        nargs="*",
        default=["openlrm-small-1.1", "openlrm-base-1.1", "openlrm-large-1.1"],
        help="default: %(default)s",
    )
    side, times = (2048, 20) if DEVICE == "cpu" else (8192, 500)
    with torch.inference_mode():
        products = finished(plain_products(side, times)), 2 * side**3 * times
        for variant in parser.parse_args().variants:
            run, work = blocks(models.build("lrm", variant))
            seconds, rate = bench.median_time(finished(run), 7, products)
            print(
                f"{variant:20s} torch {torch.__version__}, {DEVICE}, {DTYPE}: {seconds:.3f} s, {work / 1e12:.3f} TFLOP, "
                f"{work / seconds / rate:.0%} of {rate / 1e9:.0f} GFLOP/s",
                flush=True,
            )


def plain_products(side, times):
    """A function that runs `times` products of side^3."""
    identity = torch.eye(side, device=DEVICE, dtype=DTYPE)

    def run():
        x = identity
        for _ in range(times):
            x = x @ identity

    return run


def finished(function):
    """Wraps `function` so that it returns only when the device is done."""

    def run():
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def blocks(model):
    """Returns a function that runs all blocks of the model on one image, and the operations of its products."""
    encoder = model.encoder
    E, D = encoder["width"], model.width
    M = (model.image_size // encoder["patch"]) ** 2 + 1
    T = M + encoder.get("num_registers", 0)
    L = 3 * model.plane_tokens**2
    layers = [
        dict(qkv=random(3 * E, E), out=random(E, E), fc1=random(4 * E, E), fc2=random(E, 4 * E))
        for _ in range(encoder["depth"])
    ]
    transformer = [
        dict(
            q=random(D, D), kv=random(2 * D, E), cross_out=random(D, D), qkv=random(3 * D, D), out=random(D, D),
            fc1=random(4 * D, D), fc2=random(D, 4 * D), modulation=random(3, 2 * D, model.camera_width),
        )
        for _ in range(model.depth)
    ]  # fmt: skip
    image_TE, queries_LD, camera = random(T, E), random(L, D), random(1, model.camera_width)

    def norm(x, modulation=None):
        x = F.layer_norm(
            x, x.shape[-1:], weight=x.new_ones(x.shape[-1]), bias=x.new_zeros(x.shape[-1])
        )
        if modulation is None:
            return x
        shift, scale = F.linear(F.silu(camera), modulation).chunk(2, dim=-1)
        return x * (1 + scale) + shift

    def mlp(x, p):
        return F.linear(F.gelu(F.linear(x, p["fc1"])), p["fc2"])

    def run():
        x = image_TE
        for p in layers:
            q, k, v = F.linear(norm(x), p["qkv"]).chunk(3, dim=-1)
            x = x + F.linear(attention(q, k, v, encoder["num_heads"]), p["out"])
            x = x + mlp(norm(x), p)
        context, x = x[:M], queries_LD  # without the registers
        for p in transformer:
            q = F.linear(norm(x, p["modulation"][0]), p["q"])
            k, v = F.linear(context, p["kv"]).chunk(2, dim=-1)
            x = x + F.linear(attention(q, k, v, model.num_heads), p["cross_out"])
            q, k, v = F.linear(norm(x, p["modulation"][1]), p["qkv"]).chunk(3, dim=-1)
            x = x + F.linear(attention(q, k, v, model.num_heads), p["out"])
            x = x + mlp(norm(x, p["modulation"][2]), p)
        return x

    work = encoder["depth"] * (24 * T * E**2 + 4 * T**2 * E)
    work += model.depth * (28 * L * D**2 + 4 * M * E * D + 4 * L * (L + M) * D)
    return run, work


def attention(q_LD, k_MD, v_MD, num_heads):
    """Multi-head attention for one sequence."""
    heads = [x.unflatten(-1, (num_heads, -1)).transpose(0, 1)[None] for x in (q_LD, k_MD, v_MD)]
    return F.scaled_dot_product_attention(*heads)[0].transpose(0, 1).flatten(1)


def random(*shape):
    """Small random numbers on the device."""
    return 0.02 * torch.randn(shape, device=DEVICE, dtype=DTYPE)


if __name__ == "__main__":
    main()
