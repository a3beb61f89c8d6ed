import math

import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval import published


@pytest.mark.parametrize(
    "dataset, task, model, guidance, figure, value",
    [
        ("celebahq", "unconditional", "LDM-4", 1, "fid", 5.11),
        ("imagenet", "class-conditional", "LDM-4-G", 1.5, "fid", 3.60),
        ("imagenet", "class-conditional", "LDM-4-G", 1.5, "is", 247.67),
        ("imagenet", "reconstruction", "kl-f8 c=4", 1, "rfid", 0.90),
        ("imagenet", "reconstruction", "vq-f4 |Z|=8192 c=3", 1, "psnr", 27.43),
        ("places", "inpainting", "LDM-4 (big, fine-tuned)", 1, "fid", 1.50),
    ],
)
def test_figures_are_those_of_the_tables(dataset, task, model, guidance, figure, value):
    rows = published.lookup(dataset, task)
    (found,) = (
        r for r in rows if (r.model, r.guidance) == (model, guidance) and figure in r.figures
        and "Table" in r.source
    )  # fmt: skip
    assert found.figures[figure] == value


def test_every_row_is_marked_published_and_names_its_source():
    rows = published._rows()
    assert len(rows) > 100
    for row in rows:
        assert "Table" in row.source or "README" in row.source or "card" in row.source
        assert row.figures and all(math.isfinite(v) and v > 0 for v in row.figures.values())
        assert row.std.keys() <= row.figures.keys()
        line = published.describe(row)
        assert line.startswith("published: ") and row.source in line and "\n" not in line


def test_nothing_is_found_where_nothing_was_published():
    assert published.lookup("digits", "unconditional") == []
    with pytest.raises(InputError, match="task 'sorting'"):
        published.lookup("imagenet", "sorting")
