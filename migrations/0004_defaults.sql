-- Whatever others set up in the database does not stop the outbox.

-- A publication for all tables, which change data capture and migration services create, takes from every table without a
-- replica identity the right to be updated or deleted from. This table has no key.
alter table outbox.published replica identity full;
alter table outbox.published_0 replica identity full;
alter table outbox.published_1 replica identity full;

-- The expression in it is text of the caller's session until it is first run there.
alter function outbox.check_event set standard_conforming_strings = on;
