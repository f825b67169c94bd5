-- The outbox: what a transaction writes so that the caches hear of it.
--
-- Rows are inserted in the writer's own transaction (outbox.enqueue) and deleted by a relay in the transaction in which
-- it received the acknowledgement of the message broker. A row that is here has not been published for certain.

do $$
begin
    -- Not `if not exists`, which reports what it skips.
    if to_regnamespace('outbox') is null then
        create schema outbox;
    end if;
end
$$;

comment on schema outbox is 'Cache invalidation events waiting to be published, and what is kept of the published ones';

-- Raises an error that names the broken rule. Mirrors CacheKey, Topic, Traceparent and Event in the `event` crate.
create function outbox.check_event(
    keys text[], topic text, value bytea, version bigint, ttl_ms bigint, traceparent text
) returns void
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
    key text;
    place integer := 0;
begin
    if keys is null or cardinality(keys) = 0 then
        raise exception 'event names no key' using errcode = '22023';
    end if;
    if cardinality(keys) > 10000 then
        raise exception 'event names % keys, the limit is 10000', cardinality(keys)
            using errcode = '22023', hint = 'Split it into several events.';
    end if;
    foreach key in array keys loop
        if key is null or key = '' then
            raise exception 'key % of the event is empty', place using errcode = '22023';
        end if;
        if octet_length(key) > 1024 then
            raise exception 'key % of the event has % bytes, the limit is 1024', place, octet_length(key)
                using errcode = '22023';
        end if;
        if key ~ '[\x01-\x1f\x7f-\x9f]' then
            raise exception 'key % of the event has a control character', place using errcode = '22023';
        end if;
        place := place + 1;
    end loop;
    if topic !~ '^[A-Za-z0-9_-]{1,64}$' then
        raise exception 'topic % is not 1 to 64 letters, digits, _ and -', quote_literal(left(topic, 80))
            using errcode = '22023';
    end if;
    if traceparent !~ '^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$' then
        raise exception 'traceparent is not a W3C trace context of version 00' using errcode = '22023';
    end if;
    if num_nulls(value, version, ttl_ms) not in (0, 3) then
        raise exception 'an update needs value, version and ttl_ms, a delete none of them' using errcode = '22023';
    end if;
    if value is null then
        return;
    end if;
    if cardinality(keys) <> 1 then
        raise exception 'an update names one key, this one names %', cardinality(keys) using errcode = '22023';
    end if;
    if octet_length(value) > 524288 then
        raise exception 'value has % bytes, the limit is 524288', octet_length(value)
            using errcode = '22023', hint = 'Enqueue a delete instead.';
    end if;
    if version < 0 then
        raise exception 'version % is negative', version using errcode = '22023';
    end if;
    if ttl_ms not between 1 and 31622400000 then
        raise exception 'ttl_ms % is not between 1 and 31622400000, which is 366 days', ttl_ms using errcode = '22023';
    end if;
end
$$;

comment on function outbox.check_event is 'Raises what is wrong with an event, if anything is';

-- Whether check_event can be spared: the usual few short keys are judged by built-in functions alone, which Postgres
-- inlines into the caller's plan. STABLE because array_to_string is.
create function outbox.is_plain(
    keys text[], topic text, value bytea, version bigint, ttl_ms bigint, traceparent text
) returns boolean
language sql stable parallel safe
return coalesce(
    num_nulls(value, version, ttl_ms) = 3
    and (topic = 'default' or topic ~ '^[A-Za-z0-9_-]{1,64}$')
    and (traceparent is null or traceparent ~ '^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$')
    and cardinality(keys) between 1 and 100
    and array_position(keys, null) is null
    and array_position(keys, '') is null
    and octet_length(array_to_string(keys, '')) <= 1024
    and array_to_string(keys, '') !~ '[\x01-\x1f\x7f-\x9f]',
    false);

comment on function outbox.is_plain is 'Whether an event is a delete of a few short keys with nothing wrong about it';

-- No CHECK constraints: Postgres reads and plans each one anew in every statement, which took a fifth of the writer's
-- throughput. What comes in is checked where it comes in (outbox.enqueue, the types of the `outbox` crate); a row that
-- somebody inserts past them is checked again by the relay, which sets it aside in outbox.dead_letters with the reason.
create table outbox.events (
    seq bigint generated always as identity primary key,
    id uuid not null,
    topic text not null default 'default',
    keys text[] not null,
    value bytea,
    version bigint,
    ttl_ms bigint,
    xid xid8 not null default pg_current_xact_id(),
    traceparent text,
    created_at timestamptz not null default clock_timestamp(),
    namespace boolean not null default false
) with (
    -- Every row is deleted within milliseconds, so the table is nothing but dead tuples: vacuum often, without pauses,
    -- and never wait for a share of a size that is normally zero.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 20000,
    autovacuum_vacuum_insert_threshold = -1,
    autovacuum_vacuum_cost_delay = 0,
    autovacuum_analyze_scale_factor = 0,
    autovacuum_analyze_threshold = 200000
);

-- Spend no processor time of the writer on compression; and the relay bounds its memory by the stored size.
alter table outbox.events alter column value set storage external;
alter table outbox.events alter column keys set storage external;

comment on table outbox.events is 'Events of committed transactions that are not yet known to be published';
comment on column outbox.events.seq is 'Order of insertion, not of commit: never use it as a cursor';
comment on column outbox.events.id is 'Identity of the event, a UUID of version 7';
comment on column outbox.events.topic is 'Last token of the NATS subject, invalidation.<topic>';
comment on column outbox.events.keys is 'Cache keys that the transaction made stale';
comment on column outbox.events.value is 'For an update: the new value of the one key, byte for byte';
comment on column outbox.events.version is 'For an update: version of the value, taken while holding the row lock';
comment on column outbox.events.ttl_ms is 'For an update: how long the value may be served, in milliseconds';
comment on column outbox.events.xid is 'Transaction that enqueued the event';
comment on column outbox.events.traceparent is 'W3C trace context of the writer';
comment on column outbox.events.created_at is 'When the event was enqueued, by the clock of the database';
comment on column outbox.events.namespace is 'Whether every key that begins with one of keys is stale';

create table outbox.dead_letters (
    id uuid not null,
    seq bigint not null,
    topic text not null,
    keys text[] not null,
    value bytea,
    version bigint,
    ttl_ms bigint,
    xid xid8 not null,
    traceparent text,
    created_at timestamptz not null,
    namespace boolean not null,
    reason text not null,
    dead_at timestamptz not null default clock_timestamp(),
    -- A producer may give an id twice; each row is an event of its own.
    primary key (id, seq)
);

comment on table outbox.dead_letters is 'Events set aside because publishing them can never succeed; see relay dead';
comment on column outbox.dead_letters.id is 'Identity of the event';
comment on column outbox.dead_letters.seq is 'Its seq in outbox.events';
comment on column outbox.dead_letters.topic is 'As in outbox.events';
comment on column outbox.dead_letters.keys is 'As in outbox.events';
comment on column outbox.dead_letters.value is 'As in outbox.events';
comment on column outbox.dead_letters.version is 'As in outbox.events';
comment on column outbox.dead_letters.ttl_ms is 'As in outbox.events';
comment on column outbox.dead_letters.xid is 'As in outbox.events';
comment on column outbox.dead_letters.traceparent is 'As in outbox.events';
comment on column outbox.dead_letters.created_at is 'As in outbox.events';
comment on column outbox.dead_letters.namespace is 'As in outbox.events';
comment on column outbox.dead_letters.reason is 'Why it can never be published';
comment on column outbox.dead_letters.dead_at is 'When it was set aside';

-- What was published lately, one row per message, so that a broker that lost its disk can be given it again. Two
-- partitions take turns and are emptied by TRUNCATE: no dead tuples, no vacuum.
create table outbox.published (
    half smallint not null,
    stream_created timestamptz not null,
    stream_seq bigint not null,
    subject text not null,
    message_id text not null,
    traceparent text,
    events integer not null,
    body bytea not null,
    published_at timestamptz not null default clock_timestamp()
) partition by list (half);

create table outbox.published_0 partition of outbox.published for values in (0);
create table outbox.published_1 partition of outbox.published for values in (1);
alter table outbox.published_0 alter column body set storage external;
alter table outbox.published_1 alter column body set storage external;
create index on outbox.published (stream_created, stream_seq);

comment on table outbox.published is 'Envelopes published lately, kept in case the broker loses them';
comment on column outbox.published.half is 'Which of the two partitions it is in';
comment on column outbox.published.stream_created is 'Creation time of the stream that acknowledged it: its identity';
comment on column outbox.published.stream_seq is 'Sequence the stream gave it, or one not below';
comment on column outbox.published.subject is 'NATS subject';
comment on column outbox.published.message_id is 'Nats-Msg-Id';
comment on column outbox.published.traceparent is 'W3C trace context header';
comment on column outbox.published.events is 'How many outbox rows it settled';
comment on column outbox.published.body is 'The encoded envelope';
comment on column outbox.published.published_at is 'When the acknowledgement was recorded';

create table outbox.retention (
    single boolean primary key default true check (single),
    half smallint not null default 0,
    rotated_at timestamptz not null default now(),
    -- Nothing was ever published before the table existed.
    retained_since timestamptz not null default '0001-01-01 00:00:00+00'
);

insert into outbox.retention default values;

comment on table outbox.retention is 'Which partition of outbox.published takes new rows; exactly one row';
comment on column outbox.retention.single is 'Keeps the table to one row';
comment on column outbox.retention.half is 'Partition that takes new rows';
comment on column outbox.retention.rotated_at is 'When it began to';
comment on column outbox.retention.retained_since is 'Everything published since is still in outbox.published';

create table outbox.streams (
    created timestamptz primary key,
    complete_since timestamptz not null,
    recorded_at timestamptz not null default now()
);

comment on table outbox.streams is 'Streams the relays have published to, and from when on each one is complete';
comment on column outbox.streams.created is 'Creation time of the stream: its identity';
comment on column outbox.streams.complete_since is 'Every event published since is in the stream or was in it';
comment on column outbox.streams.recorded_at is 'When a relay first met the stream';

-- A UUID of version 7: 48 bits of milliseconds, then version, variant and randomness (RFC 9562, section 5.7). One
-- expression, so that it is inlined. random() has a strong seed in every session and costs a tenth of gen_random_uuid(),
-- which asks OpenSSL each time: that alone cost writers an eighth of their throughput. Nobody has to be unable to guess an id.
create function outbox.new_id() returns uuid
language sql volatile parallel safe
return encode(
    int8send(((date_part('epoch', clock_timestamp()) * 1000)::bigint << 16) | 28672 | (random() * 4095)::bigint)
    || int8send((random() * 4611686018427387903)::bigint | (1::bigint << 63)),
    'hex')::uuid;

comment on function outbox.new_id is 'A fresh event id, a UUID of version 7';

-- The way in for every language. Runs in the caller's transaction; SECURITY DEFINER so that a producer needs nothing but
-- EXECUTE on it. Its body names every schema and has no operator, so that the caller's search_path, which it keeps for the
-- sake of speed, cannot lead it astray. In plpgsql, which keeps its plan; a function in SQL would plan at every call.
create function outbox.enqueue(
    keys text[],
    topic text default 'default',
    value bytea default null,
    version bigint default null,
    ttl_ms bigint default null,
    traceparent text default null,
    id uuid default null,
    out event_id uuid,
    out xid xid8,
    out seq bigint
)
language plpgsql volatile security definer
as $$
#variable_conflict use_variable
begin
    if not outbox.is_plain(keys, topic, value, version, ttl_ms, traceparent) then
        topic := coalesce(topic, 'default');
        perform outbox.check_event(keys, topic, value, version, ttl_ms, traceparent);
    end if;
    insert into outbox.events as e (id, topic, keys, value, version, ttl_ms, traceparent)
    values (coalesce(id, outbox.new_id()), topic, keys, value, version, ttl_ms, traceparent)
    returning e.id, e.xid, e.seq into event_id, xid, seq;
end
$$;

comment on function outbox.enqueue is
    'Records in the current transaction that these cache keys changed; with value, version and ttl_ms: what one key holds now';

-- The way in for namespaces; apart from outbox.enqueue, which is not to pay for what is rare.
create function outbox.enqueue_namespaces(
    namespaces text[],
    topic text default 'default',
    traceparent text default null,
    out event_id uuid,
    out xid xid8,
    out seq bigint
)
language plpgsql volatile security definer
as $$
#variable_conflict use_variable
begin
    topic := coalesce(topic, 'default');
    perform outbox.check_event(namespaces, topic, null, null, null, traceparent);
    if pg_catalog.cardinality(namespaces) operator(pg_catalog.>) 100 then
        raise exception 'event names % namespaces, the limit is 100', pg_catalog.cardinality(namespaces)
            using errcode = '22023';
    end if;
    insert into outbox.events as e (id, topic, keys, traceparent, namespace)
    values (outbox.new_id(), topic, namespaces, traceparent, true)
    returning e.id, e.xid, e.seq into event_id, xid, seq;
end
$$;

comment on function outbox.enqueue_namespaces is
    'Records in the current transaction that every key that begins with one of these is stale; the whole cache is searched';

-- Waits inside the server, so that an idle relay asks four times a second instead of hundreds of times. Every look has a
-- snapshot of its own; the statement as a whole holds vacuum back for `patience` at most. Only the index is looked at:
-- the plan is kept, and the table may be full of dead rows the next time.
create function outbox.wait_for_events(
    from_seq bigint,
    min_pause double precision,
    max_pause double precision,
    patience double precision
) returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
declare
    pause double precision := min_pause;
    give_up timestamptz := clock_timestamp() + patience * interval '1 second';
begin
    loop
        perform from outbox.events where seq >= from_seq order by seq limit 1;
        if found then
            return true;
        end if;
        if clock_timestamp() >= give_up then
            return false;
        end if;
        perform pg_sleep(pause);
        pause := least(pause * 1.5, max_pause);
    end loop;
end
$$;

comment on function outbox.wait_for_events is
    'Waits up to patience seconds for a committed row at or above from_seq, claimed or not, and says whether there is one';
