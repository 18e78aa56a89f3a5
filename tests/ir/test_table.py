"""Tables that fit their width."""

from simqat_jax.ir.table import Column, shortened, table, terminal_width

COLUMNS = (
    Column("layer", "path"),
    Column("what", "words"),
    Column("output", "words"),
    Column("bytes", right=True),
)
ATTENTION = "Encoder_0/EncoderBlock_{}/MultiHeadDotProductAttention_0/{}"
PATHS = [ATTENTION.format(k, name) for k in (0, 1) for name in ("query", "dot_general_1")]
ROWS = [(path, "Conv 3x3 16 + BatchNorm + relu", "8 bits [-62.3, 74.8]", "12") for path in PATHS]


def test_a_table_that_fits_is_as_wide_as_it_needs():
    assert table(COLUMNS[:2], [("a", "b c")], 80) == ["layer  what", "a      b c"]
    assert table(COLUMNS[2:], [("a", "8")], 80) == ["output  bytes", "a           8"]


def test_words_go_on_below_and_paths_differ():
    for width in (68, 78, 84):
        lines = table(COLUMNS, ROWS, width)
        assert max(map(len, lines)) <= width
        rows = [line for line in lines[1:] if not line.startswith(" ")]
        assert len(rows) == len({row.split()[0] for row in rows}) == len(ROWS)
        for words in ("relu", "BatchNorm", "[-62.3, 74.8]"):
            assert "\n".join(lines).count(words) == len(ROWS)


def test_narrow_tables_lose_no_words():
    lines = table([COLUMNS[0], COLUMNS[2]], [(PATHS[0], "16 bits [-1.23e-05, 1.23e-05]")], 26)
    assert max(map(len, lines)) == 26
    kept = "".join(line[14:] for line in lines).replace(" ", "")
    assert kept == "output16bits[-1.23e-05,1.23e-05]"


def test_paths_keep_their_ends():
    path = ATTENTION.format(1, "query")
    assert shortened(path, len(path)) == path
    assert shortened(path, 40) == "Encoder_0/Encod…ock_1/Multi…ion_0/query"
    assert shortened(path, 33) == "Encoder_0/Enc…ck_1/Mul…on_0/query"
    assert shortened(path, 12) == "…ion_0/query"
    for width in range(2, 70):
        assert len(shortened(path, width)) <= width


def test_as_wide_as_the_terminal_and_never_below_80(monkeypatch):
    for columns, want in ((40, 80), (80, 80), (132, 132)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert terminal_width() == want
