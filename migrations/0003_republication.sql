-- Which stream the relays publish to, which relays those are, and what of the retained messages the stream has to be given
-- again. Retained messages are never changed: what is to be published again are ranges of their table.

alter table outbox.retention
    add column stream_created timestamptz,
    add column stream_identity timestamptz;

comment on column outbox.retention.stream_created is 'Creation time of the stream that the relays publish to';
comment on column outbox.retention.stream_identity is
    'What new rows of outbox.published carry as stream_created: the creation time of the stream, or when it last lost messages';
comment on column outbox.published.stream_created is 'Identity of the content of the stream that acknowledged it';
comment on column outbox.published.stream_seq is 'Sequence the stream gave it';
comment on column outbox.streams.complete_since is
    'Every event published since is in the stream, was in it, or is about to be published to it again';

alter table outbox.streams
    add column refilled_to bigint,
    add column refilled_since timestamptz;

comment on column outbox.streams.refilled_to is
    'What the stream lacked before this sequence was published to it again, from refilled_since on';
comment on column outbox.streams.refilled_since is 'From when on';

-- A stream that an older relay was about to complete counts as new, so that all is published to it again.
update outbox.retention set (stream_created, stream_identity) = (
    select s.created, s.created from outbox.streams s
    where not exists (select from outbox.published p where p.stream_created < s.created)
      and not exists (select from outbox.published p where p.stream_created > s.created)
    order by s.recorded_at desc limit 1);

create table outbox.republications (
    id bigint generated always as identity primary key,
    stream_created timestamptz not null,
    half smallint not null,
    after_place tid not null,
    before_place tid not null,
    since timestamptz not null,
    not_of timestamptz,
    messages bigint not null
);

comment on table outbox.republications is
    'Parts of outbox.published that the stream has to be given again; a row goes when its part was published';
comment on column outbox.republications.id is 'Order in which they are taken';
comment on column outbox.republications.stream_created is 'Creation time of the stream';
comment on column outbox.republications.half is 'Partition of outbox.published';
comment on column outbox.republications.after_place is 'Everything up to this place was published or belongs to another part';
comment on column outbox.republications.before_place is 'Where the part ends';
comment on column outbox.republications.since is 'Messages recorded earlier are left out';
comment on column outbox.republications.not_of is 'Messages with this identity are left out: they came after the loss';
comment on column outbox.republications.messages is 'About how many messages that are';

create table outbox.relays (
    id uuid primary key,
    address text not null,
    stream_created timestamptz not null,
    seen_at timestamptz not null default clock_timestamp()
);

comment on table outbox.relays is 'Relays that run, and the stream each one sees: it must be the same';
comment on column outbox.relays.id is 'One process';
comment on column outbox.relays.address is 'Where it connects from, as Postgres sees it';
comment on column outbox.relays.stream_created is 'Creation time of the stream that it sees';
comment on column outbox.relays.seen_at is 'When it last looked';
