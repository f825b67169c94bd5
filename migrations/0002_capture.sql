-- How far the write-ahead log was read, and on which server: so that a reader notices when it does not go on where it
-- left off.
create table outbox.capture (
    slot text primary key,
    system_id text not null,
    timeline bigint not null,
    confirmed pg_lsn not null,
    recorded_at timestamptz not null default clock_timestamp()
);

comment on table outbox.capture is 'Position of the readers of the write-ahead log, one row per replication slot';
comment on column outbox.capture.slot is 'Replication slot';
comment on column outbox.capture.system_id is 'Identity of the Postgres cluster';
comment on column outbox.capture.timeline is 'Timeline of the cluster; grows with every failover';
comment on column outbox.capture.confirmed is 'Everything before it is published; recorded before the slot hears of it';
comment on column outbox.capture.recorded_at is 'When it was recorded';
