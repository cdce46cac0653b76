"""How a paper's table is asked for: the keys of a style file, which are the options of the command `tables --paper`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictStr, ValidationError

from results.escape import cut, one_line
from results.metrics import nearest


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[tuple[StrictStr, ...], BeforeValidator(_as_list), Field(min_length=1)]
Format = Literal["latex", "html", "excel", "csv", "markdown"]
Scalar = str | int | float | bool


class PaperStyle(BaseModel):
    """A paper's table, as `paper_table` and `write_paper` take it; None: their default.

    Names may be one text or a list. `out` is the folder of the files; a relative one is below the working folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: Names | None = None
    norms: Names | None = None
    metrics: Names | None = None
    rows: dict[StrictStr, StrictStr] = Field(default_factory=dict)
    order: Names | None = None
    where: dict[StrictStr, Scalar | list[Scalar]] = Field(default_factory=dict)
    select: StrictStr | None = None
    transpose: StrictBool = False
    reference: StrictStr | None = None
    digits: Annotated[int, Field(ge=0, le=6, strict=True)] | None = None
    spread: Literal["std", "none"] = "std"
    environment: Literal["table", "table*"] = "table"
    caption: Literal["short", "full", "none"] = "short"
    numbers: Literal["plain", "siunitx"] = "plain"
    format: Annotated[tuple[Format, ...], BeforeValidator(_as_list), Field(min_length=1)] | None = None
    out: StrictStr | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], source: str) -> PaperStyle:
        """The style in a mapping.

        Raises:
            ValueError: keys or values that are not allowed, a line for each, with the nearest name.
        """
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            lines = [f"{source}: {_mistake(cls, entry)}" for entry in error.errors()]
            raise ValueError("\n".join(dict.fromkeys(lines))) from None

    def over(self, below: PaperStyle) -> PaperStyle:
        """This style, with what it does not name taken from another one; `rows` and `where` are joined."""
        joined = {name: {**getattr(below, name), **getattr(self, name)} for name in ("rows", "where")}
        own = {name: getattr(self, name) for name in self.model_fields_set}
        return below.model_copy(update=own | joined)

    @property
    def of_table(self) -> dict[str, Any]:
        """The arguments of `paper_table`."""
        names = ("tasks", "norms", "metrics", "order", "transpose", "select", "reference", "digits", "spread")
        return {name: getattr(self, name) for name in names} | {"rows": self.rows, "where": self.where}

    @property
    def of_files(self) -> dict[str, Any]:
        """The arguments of `write_paper` beside the folder and the formats."""
        return {name: getattr(self, name) for name in ("environment", "caption", "numbers")}


def _mistake(model: type[PaperStyle], entry: Any) -> str:
    key, kind, value = str(entry["loc"][0]), entry["type"], cut(one_line(str(entry.get("input"))), 60)
    if kind == "extra_forbidden":
        keys = list(model.model_fields)
        return f'unknown key "{cut(one_line(key), 60)}"; keys: {", ".join(keys)}{nearest(key, keys)}'
    if kind == "literal_error":
        annotation = model.model_fields[key].annotation
        allowed = get_args(Format) if key == "format" else get_args(annotation)
        return f'{key} "{value}": {", ".join(allowed[:-1])} or {allowed[-1]}{nearest(value, allowed)}'
    needed = {
        "rows": "a mapping of norms to printed names",
        "where": "a mapping of options to values",
        "digits": "a whole number from 0 to 6",
        "transpose": "true or false",
        "select": "an option's name",
        "reference": "a norm's name",
        "out": "a folder's path",
    }
    return f'{key} "{value}": {needed.get(key, "a name or a list of names")} is needed'
