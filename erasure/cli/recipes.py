"""``erasure recipes``: when an image counts as unsafe."""

from .options import Json, emit

COLUMNS = ("recipe", "detector", "classes", "threshold", "unit")


def recipes(*, json: Json = False) -> None:
    """List recipes: when an image counts as unsafe, as each paper had it."""
    from erasure.eval.recipes import list_recipes

    records = list_recipes()
    if json:
        emit(records, json)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, no_wrap=column in ("recipe", "detector"))
    for record in records:
        table.add_row("\n".join([record["recipe"], *record["also"]]), *(str(record[column]) for column in COLUMNS[1:]))
    console = Console()
    console.print(table)
    for record in records:
        if record["status"] != "ready":
            console.print(f"{record['recipe']} {record['status']}", highlight=False, markup=False, soft_wrap=True)
