"""Where fields come from: the keys under `source:` of a `build-crops` job."""

from __future__ import annotations

import re
import string
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cosmic_ray.config import Config, Uri

TEXT_COLUMNS = ("source", "plate", "well", "site", "cell_line", "treatment")
"""What is known of a field, as text; all of it may be empty."""

TABLE_COLUMNS = (*TEXT_COLUMNS, "field_uri", "label_uri", "pixel_size_um", "page", "simulated")
"""What a column of a table can say of a field."""

Micrometres = Annotated[float, Field(gt=0)]


class Channel(Config):
    """One channel of a crop, and where it lies."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")] = "DNA"
    """Its name in the crop store: letters, digits and underscores, since columns are named after it."""

    file: str | None = None
    """Which file holds it. `table`: a column of file names, or a template over columns such as `images/{id}.png`
    (default: the column `field_uri` for the first channel, the channel's name for others). `cpg`: the suffix of
    `FileName_` and `PathName_` (default: `Orig` and the channel's name). `folder`: what the group `channel` of `names`
    matches (default: the channel's name)."""

    index: Annotated[int, Field(ge=0)] | None = None
    """Position of the channel inside its file, from 0; not needed where the file has one."""

    illumination: str | None = None
    """An illumination function (`.npy`, of the field's shape) that the field is divided by. `table`: its column;
    `cpg`: its suffix, such as `IllumDNA`."""


class Defaults(Config):
    """What is said of a field where its catalogue does not say it."""

    source: str = ""
    """Name of the source, the first part of every `crop_id`; by default the key in `sources`, of a single one none."""
    plate: str = ""
    """Plate."""
    well: str = ""
    """Well."""
    cell_line: str = ""
    """Cell line."""
    treatment: str = ""
    """Treatment."""
    pixel_size_um: Micrometres | None = None
    """Micrometres a pixel; unknown by default."""


class Source(Config):
    """A catalogue of fields, or of ready crops."""

    uri: Uri
    """`folder`: the folder; `table`: a CSV, TSV or Parquet file; `cpg`: a `load_data.csv`, or a folder of them. Public
    buckets are read as `s3://anonymous@bucket/prefix`."""

    layout: Literal["folder", "table", "cpg"] = "folder"
    """`folder`: image files below a folder; `table`: one row a field; `cpg`: the Cell Painting Gallery's tables."""

    holds: Literal["fields", "crops"] = "fields"
    """`fields`: nuclei are searched in them. `crops`: each file is a ready crop, taken as it is; its `site` becomes the
    `crop_id` (by default its path below `uri` without the suffix; with `names` or in a table, its file's name)."""

    pattern: str | None = None
    """A glob below `uri`. `folder`: the images (default: every TIFF, PNG and JPEG); `cpg`: the tables (default:
    `**/load_data.csv*`)."""

    names: str | None = None
    r"""`folder`: a regular expression searched in the path below `uri`, whose named groups say what the field is, such
    as `(?P<plate>[^/]+)/(?P<well>[A-P]\d\d)_s(?P<site>\d+)_(?P<channel>\w+)\.tif`; files with another `channel` than
    those listed are left alone. By default the path without its suffix is the site."""

    channels: Annotated[tuple[Channel, ...], Field(min_length=1)] = (Channel(),)
    """The channels of a crop, in order; nuclei are searched in the first."""

    labels: str | None = None
    """A template of the field's label image (0 background, one number a nucleus), used instead of our segmentation,
    such as `labels/{stem}.png`, below `root`. `folder` knows `{path}`, `{folder}`, `{stem}` and the groups of `names`;
    `table` and `cpg` know the columns."""

    columns: dict[str, str] = {}
    """`table` and `cpg`: which column of the table says what; by default those of the same name (`cpg`:
    `Metadata_Plate`, `Metadata_Well`, `Metadata_Site` and, where they are there, `Metadata_Source`,
    `Metadata_cell_line`, `Metadata_treatment`, `Metadata_pixel_size_um`, `Metadata_simulated`)."""

    root: Uri | None = None
    """What relative file names are relative to; by default the folder of the table, or `uri`."""

    remap: dict[str, str] = {}
    """Beginnings of file names to replace, such as `/home/ubuntu/bucket/: s3://anonymous@cellpainting-gallery/`."""

    defaults: Defaults = Defaults()
    """What holds where the catalogue is silent."""

    @field_validator("names")
    @classmethod
    def _known_groups(cls, names: str | None) -> str | None:
        if names is None:
            return None
        try:
            groups = set(re.compile(names).groupindex)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        unknown = groups - {*TEXT_COLUMNS, "channel"}
        if unknown or not groups:
            raise ValueError(f"named groups are {', '.join((*TEXT_COLUMNS, 'channel'))}; here {sorted(groups)}")
        return names

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        unknown = sorted(set(columns) - set(TABLE_COLUMNS))
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not one of {', '.join(TABLE_COLUMNS)}")
        return columns

    @field_validator("labels")
    @classmethod
    def _template(cls, labels: str | None) -> str | None:
        if labels is not None:
            template_names(labels)
        return labels

    @model_validator(mode="after")
    def _consistent(self) -> Source:
        names = [channel.name for channel in self.channels]
        if len(set(names)) < len(names):
            raise ValueError(f"two channels of one name: {names}")
        if self.layout != "folder" and self.names is not None:
            raise ValueError(f"`names` is for layout folder, not {self.layout}")
        if self.layout == "folder" and (self.columns or any(channel.illumination for channel in self.channels)):
            raise ValueError("`columns` and `illumination` need a table: layout table or cpg")
        if self.holds == "crops" and self.labels is not None:
            raise ValueError("`labels` is for fields; these are ready crops")
        return self


def template_names(template: str) -> list[str]:
    """The names in braces of a template.

    Raises:
        ValueError: where the braces do not match or hold anything but a name.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"not a template: {error}") from None
    if not all(names):
        raise ValueError("a template names a column in each pair of braces")
    return names
