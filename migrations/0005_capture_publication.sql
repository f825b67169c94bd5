-- What the publication was when it was last right, so that one that was changed and changed back is noticed; and the
-- decision of an operator, which the relay carries out.
alter table outbox.capture
    add column publication text,
    add column begin_anew boolean not null default false;

comment on column outbox.capture.publication is 'Fingerprint of the publication: object ids and versions of its rows in the catalog';
comment on column outbox.capture.begin_anew is 'An operator has accepted that changes are missing, or dropped the slot: the relay makes a new slot and declares every key stale that the rules can name';
