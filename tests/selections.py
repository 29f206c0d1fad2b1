"""A small selection of blocks for tests."""

from edge_dit.planning.selection import Selection

HASH = "0123456789abcdef" * 4


def selection(head=(0, 0.1, 0.5, 0.9), tail=(0, 0.2, 0.3, 0.9), **changes):
    fields = {
        "model_hash": HASH,
        "layers": len(head) - 1,
        "method": "generation",
        "embedding": "VAE latents",
        "subjects": ["toy"],
        "steps": 3,
        "prompts": ["a sks toy"],
        "seeds": [1],
        "draws": 1,
        "over": "generated pictures",
        "head": [float(value) for value in head],
        "tail": [float(value) for value in tail],
        "seconds": 1.5,
    }
    return Selection(**{**fields, **changes})


def between(head=0, run=(1, 2), tail=0, gain=0.2, error=0.05):
    return {"head_skip": head, "tail_skip": tail, "run": run, "gain": gain, "error": error}
