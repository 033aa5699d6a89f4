"""Ways to damage bytes and values, for the files of test_fuzz.py and fuzz_state.py."""

import torch

STRANGE = [
    None,
    0,
    -1.5,
    True,
    float("inf"),
    "",
    " ",
    "字",
    [],
    ["字", ["字"]],
    [[]],
    {},
    {"text": {"text": "字"}},
    [None],
    [{}],
    {"role": "user"},
    10**30,
]
SIGNS = [
    b"\x00",
    b"\n",
    b"\r\n",
    b"\r",
    b'"',
    b"'",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\\",
    b",",
    b":",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\x81",
    b"\xfe",
    b"\xe4\xb8",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\x81\x30",
    b"\\ud800",
    b"\\u12",
    b"\x1f\x8b",
    b"null",
    b"NaN",
    b"1" * 5000,
    b"[" * 3000,
    b'{"a":' * 900,
    b"<|end|>",
]


def mutate(rng, data, signs=SIGNS):
    """The bytes, damaged in one place as disks, downloads, editors and people damage files."""
    data = bytearray(data)
    at, other = (rng.randrange(len(data) + 1) for _ in range(2))
    n = int(2 ** rng.uniform(0, 8))
    kind = rng.randrange(7)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        for _ in range(rng.randrange(1, 9) if data else 0):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del data[at : at + n]
    elif kind == 3:
        data[other:other] = data[at : at + n]
    elif kind == 4:
        data[at : at + n], data[other : other + n] = data[other : other + n], data[at : at + n]
    else:
        data[at : at + (n if kind == 5 else 0)] = rng.choice([*signs, rng.randbytes(n)])
    return bytes(data)


def change_inside(rng, value, strange=STRANGE):
    """Something else in one place of nested dicts and lists; a tensor is a place."""
    places = []
    if isinstance(value, (dict, list)):
        places = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not places or rng.random() < 0.1:
        return rng.choice([*strange, *numbers_like(value)])
    place = rng.choice(places)
    if rng.random() < 0.2:
        del value[place]
    else:
        value[place] = change_inside(rng, value[place], strange)
    return value


def numbers_like(value):
    """Other numbers in the place of a number, other tensors in the place of a tensor."""
    if isinstance(value, torch.Tensor):
        return [
            torch.ones(3),
            torch.ones(3, dtype=torch.int8),
            torch.tensor(float("nan")),
            value.double(),
            value.flatten()[:1],
            -value,
        ]
    if isinstance(value, (int, float)):
        return [value + 1, -value, value * 2, float(value), 10**12, 1e300, 1e-300, 2**63]
    return []
