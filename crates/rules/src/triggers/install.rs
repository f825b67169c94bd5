//! What is installed, what should be, and the way from one to the other.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::Duration;

use sqlx::{AssertSqlSafe, PgConnection, Row};

use super::function::{Function, Trigger, functions};
use super::{identifier, literal};
use crate::Rules;
use crate::catalog::Facts;
use crate::catalog::expand::{BOUND_AS_WRITTEN, binding};
use crate::table::TableRules;

/// One change of the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What it does, in words.
    pub what: String,
    /// The statements.
    pub sql: String,
}

/// Everything that separates the database from what the rules want.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// The changes in their order; none if all is as it should be.
    pub steps: Vec<Step>,
}

/// A table by schema and name, and the name of a trigger on it.
type Place = (String, String, String);

#[derive(Default)]
struct Installed {
    /// Arguments and comment by name; several for a name that is overloaded.
    functions: BTreeMap<String, Vec<(String, String)>>,
    /// The function each trigger calls, and whether the trigger is enabled.
    triggers: BTreeMap<Place, (String, bool)>,
}

/// Any number that nobody else locks by.
const APPLY_LOCK: i64 = 0x6f75_7462_6f78_7275;

/// Compares what is installed with what the rules want. `facts` is what [`check`](crate::catalog::check) returned.
///
/// # Errors
/// Whatever the database says.
pub async fn plan(
    connection: &mut PgConnection,
    rules: &Rules,
    facts: &[Facts],
) -> Result<Plan, sqlx::Error> {
    let installed = installed(connection).await?;
    Ok(differences(&installed, rules.tables(), facts))
}

/// What removes every trigger and function of ours, whatever rules they came from.
///
/// # Errors
/// Whatever the database says.
pub async fn removal(connection: &mut PgConnection) -> Result<Plan, sqlx::Error> {
    let installed = installed(connection).await?;
    Ok(differences(&installed, &[], &[]))
}

/// Every statement that installs the triggers in a database that has none.
#[must_use]
pub fn script(rules: &Rules, facts: &[Facts]) -> String {
    let mut script = format!("begin;\n{BOUND_AS_WRITTEN};\n");
    for step in differences(&Installed::default(), rules.tables(), facts).steps {
        let _ = write!(script, "\n-- {}\n{};\n", step.what, step.sql);
    }
    script.push_str("\ncommit;\n");
    script
}

/// Carries a plan out in the caller's transaction. Waits for no lock longer than `lock_timeout`: a writer of the table
/// that waits behind us waits as long.
///
/// # Errors
/// Whatever the database says; roll back then.
pub async fn apply(
    transaction: &mut PgConnection,
    plan: &Plan,
    lock_timeout: Duration,
) -> Result<(), sqlx::Error> {
    let begin = format!(
        "{BOUND_AS_WRITTEN}; set local lock_timeout = {}; select pg_advisory_xact_lock({APPLY_LOCK})",
        lock_timeout.as_millis().max(1)
    );
    sqlx::raw_sql(AssertSqlSafe(begin)).execute(&mut *transaction).await?;
    for step in &plan.steps {
        sqlx::raw_sql(AssertSqlSafe(step.sql.clone())).execute(&mut *transaction).await?;
    }
    Ok(())
}

fn differences(installed: &Installed, tables: &[TableRules], facts: &[Facts]) -> Plan {
    let mut plan = Plan::default();
    let mut wanted_functions = BTreeSet::new();
    let mut wanted_triggers = BTreeMap::new();
    for (table, facts) in tables.iter().zip(facts) {
        for function in functions(table, facts) {
            if let Some(trigger) = function.trigger {
                for relation in facts.relations.iter().filter(|relation| !relation.is_foreign) {
                    let place = (relation.schema.clone(), relation.name.clone(), trigger.name());
                    wanted_triggers.insert(place, (trigger, function.name.clone()));
                }
            }
            wanted_functions.insert((function.name.clone(), function.arguments.clone()));
            plan.function(installed, &function);
        }
    }
    for ((schema, table, name), (function, enabled)) in &installed.triggers {
        let place = (schema.clone(), table.clone(), name.clone());
        let wanted = wanted_triggers.get(&place).is_some_and(|(_, wanted)| wanted == function);
        if !wanted || !enabled {
            plan.step(
                format!(
                    "drop trigger {name} on {schema}.{table}{}",
                    if *enabled { "" } else { ", which is disabled" }
                ),
                format!("drop trigger {} on {}.{}", identifier(name), identifier(schema), identifier(table)),
            );
        }
    }
    for ((schema, table, name), (trigger, function)) in wanted_triggers {
        let place = (schema.clone(), table.clone(), name.clone());
        if installed.triggers.get(&place) != Some(&(function.clone(), true)) {
            plan.step(
                format!("create trigger {name} on {schema}.{table}"),
                Trigger::definition(trigger, &schema, &table, &function),
            );
        }
    }
    for (name, overloads) in &installed.functions {
        for (arguments, _) in overloads {
            if !wanted_functions.contains(&(name.clone(), arguments.clone())) {
                plan.step(
                    format!("drop function outbox.{name}"),
                    format!("drop function outbox.{}({arguments})", identifier(name)),
                );
            }
        }
    }
    plan
}

impl Plan {
    fn step(&mut self, what: String, sql: String) {
        self.steps.push(Step { what, sql });
    }

    fn function(&mut self, installed: &Installed, function: &Function) {
        let Function { name, arguments, definition, comment, bound_in, .. } = function;
        let known = installed
            .functions
            .get(name)
            .and_then(|overloads| overloads.iter().find(|(known, _)| known == arguments));
        let verb = match known {
            Some((_, known)) if known == comment => return,
            Some(_) => "replace",
            None => "create",
        };
        let signature = format!("outbox.{}({arguments})", identifier(name));
        let (before, after) = match bound_in {
            Some(schema) => (format!("{};\n", binding(schema)), ";\nset local search_path to default"),
            None => (String::new(), ""),
        };
        self.step(
            format!("{verb} function outbox.{name}"),
            format!(
                "{before}{definition}{after};\nrevoke all on function {signature} from public;\ncomment on function {signature} is {}",
                literal(comment)
            ),
        );
    }
}

async fn installed(connection: &mut PgConnection) -> Result<Installed, sqlx::Error> {
    let mut installed = Installed::default();
    let functions = sqlx::query(
        "select p.proname::text, coalesce((
            select string_agg(format('%I.%I', n.nspname, t.typname), ', ' order by a.nth)
            from unnest(p.proargtypes) with ordinality a (type, nth) join pg_type t on t.oid = a.type
            join pg_namespace n on n.oid = t.typnamespace), ''),
            coalesce(obj_description(p.oid, 'pg_proc'), '')
         from pg_proc p where p.pronamespace = to_regnamespace('outbox') and p.proname like 'outbox\\_capture\\_%'",
    )
    .persistent(false)
    .fetch_all(&mut *connection)
    .await?;
    for row in &functions {
        installed.functions.entry(row.try_get(0)?).or_default().push((row.try_get(1)?, row.try_get(2)?));
    }
    let triggers = sqlx::query(
        "select n.nspname::text, c.relname::text, t.tgname::text, p.proname::text, t.tgenabled in ('O', 'A')
         from pg_trigger t join pg_class c on c.oid = t.tgrelid join pg_namespace n on n.oid = c.relnamespace
         join pg_proc p on p.oid = t.tgfoid
         where not t.tgisinternal and p.pronamespace = to_regnamespace('outbox') and p.proname like 'outbox\\_capture\\_%'",
    )
    .persistent(false)
    .fetch_all(connection)
    .await?;
    for row in &triggers {
        let place = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        installed.triggers.insert(place, (row.try_get(3)?, row.try_get(4)?));
    }
    Ok(installed)
}
