use std::collections::BTreeSet;

use sqlx::PgConnection;

use crate::Rules;

/// What makes it unsafe to apply these rules as the role of the connection, each in a line that says what to do. The names
/// in `expand` are bound when it is created, and then run with the rights of who created it: whoever can put an operator or
/// a function into the schema before can have it run so, and into what `expand` calls at any time.
///
/// # Errors
/// Whatever the database says.
pub async fn risks(connection: &mut PgConnection, rules: &Rules) -> Result<Vec<String>, sqlx::Error> {
    let with_expand = rules.tables().iter().filter(|table| !table.expand.is_empty());
    let schemas: BTreeSet<&str> = with_expand.map(|table| table.schema.as_str()).collect();
    let mut risks = Vec::new();
    if schemas.is_empty() {
        return Ok(risks);
    }
    let superuser: bool = sqlx::query_scalar("select rolsuper from pg_roles where rolname = current_user")
        .persistent(false)
        .fetch_one(&mut *connection)
        .await?;
    if superuser {
        risks.push(
            "this is a superuser: applied so, expand runs as superuser in every writer's transaction; apply the rules as a \
             role that owns no more than the tables"
                .to_owned(),
        );
    }
    for schema in schemas {
        let creators: Vec<String> = sqlx::query_scalar(
            "select coalesce(r.rolname, 'PUBLIC')::text
             from pg_namespace n cross join aclexplode(n.nspacl) a left join pg_roles r on r.oid = a.grantee
             where n.nspname = $1 and a.privilege_type = 'CREATE' and a.grantee <> n.nspowner
                and (r.oid is null or not r.rolsuper and r.rolname <> current_user) order by 1",
        )
        .persistent(false)
        .bind(schema)
        .fetch_all(&mut *connection)
        .await?;
        if !creators.is_empty() {
            let creators = creators.join(", ");
            risks.push(format!(
                "{creators} may create in schema {schema}, and so what expand runs with the rights of who applies the rules; \
                 run `REVOKE CREATE ON SCHEMA {schema} FROM {creators}`"
            ));
        }
    }
    Ok(risks)
}
