//! What is played, one file a scene.

pub mod commit;
pub mod crash;
pub mod log;
pub mod outage;
pub mod plain_sql;
pub mod rollback;
pub mod service;
