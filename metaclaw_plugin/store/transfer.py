"""A store copied whole into another one, of either database."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.store.schema import in_flight, leases, metadata, traces

_PAGE = 500  # rows held in memory at once
_OF_PROCESSES = {in_flight.name, leases.name}  # these say what processes are doing, which do not come along


def copy_store(source: Engine, target: Engine) -> dict[str, int]:
    """Copy all rows of ``source``, as of one moment, into the empty store ``target``; returns rows by table.

    Raises:
        StoreError: if ``target`` is not empty.
    """
    snapshot = {"isolation_level": "REPEATABLE READ"} if source.dialect.name == "postgresql" else {}
    with source.connect().execution_options(**snapshot) as reader, target.begin() as writer:
        for table in metadata.sorted_tables:
            if writer.execute(sa.select(sa.func.count()).select_from(table)).scalar_one():
                raise StoreError(f"the table {table.name} of the target is not empty; give an empty database")
        copied = {
            table.name: _copy_table(reader, writer, table)
            for table in metadata.sorted_tables
            if table.name not in _OF_PROCESSES
        }
        if target.dialect.name == "postgresql":
            newest = writer.execute(sa.select(sa.func.max(traces.c.seq))).scalar_one()
            if newest is not None:
                writer.execute(sa.select(sa.func.setval(sa.func.pg_get_serial_sequence("traces", "seq"), newest)))
    return copied


def _copy_table(reader: Connection, writer: Connection, table: sa.Table) -> int:
    key = list(table.primary_key)
    copied = 0
    rows = reader.execution_options(yield_per=_PAGE).execute(sa.select(table).order_by(*key))
    for page in rows.mappings().partitions(_PAGE):
        writer.execute(table.insert(), [dict(row) for row in page])
        copied += len(page)
    return copied
