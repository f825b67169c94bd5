//! What is installed, what should be, and the way from one to the other.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::Duration;

use sqlx::{PgConnection, Row};

use super::apply::opening;
use super::function::{Function, Trigger, functions};
use super::{identifier, literal};
use crate::Rules;
use crate::catalog::Facts;
use crate::catalog::expand::binding;
use crate::table::TableRules;

/// One change of the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What it does, in words.
    pub what: String,
    /// The statements.
    pub sql: String,
    /// What the transaction is about that it belongs to: the functions of a table, or the triggers of one.
    pub part: String,
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

/// How long a table of the printed script may keep its writers waiting.
const SCRIPT_LOCK_TIMEOUT: Duration = Duration::from_secs(5);

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

/// Every statement that installs the triggers in a database that has none, in transactions that lock one table at most.
#[must_use]
pub fn script(rules: &Rules, facts: &[Facts]) -> String {
    let mut script = String::new();
    for steps in differences(&Installed::default(), rules.tables(), facts).parts() {
        let _ = write!(script, "begin;\n{};\n", opening(SCRIPT_LOCK_TIMEOUT));
        for step in steps {
            let _ = write!(script, "\n-- {}\n{};\n", step.what, step.sql);
        }
        script.push_str("\ncommit;\n\n");
    }
    script
}

/// Functions first, then the triggers that call them, table by table, and last the functions that nothing calls any more.
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
            plan.function(installed, &function, &format!("the functions of {}", table.qualified_name()));
        }
    }
    for ((schema, table), steps) in trigger_steps(installed, &wanted_triggers) {
        let part = format!("the triggers of {schema}.{table}");
        for (what, sql) in steps {
            plan.step(&part, what, sql);
        }
    }
    for (name, overloads) in &installed.functions {
        for (arguments, _) in overloads {
            if !wanted_functions.contains(&(name.clone(), arguments.clone())) {
                plan.step(
                    "the functions that nothing calls any more",
                    format!("drop function outbox.{name}"),
                    format!("drop function outbox.{}({arguments})", identifier(name)),
                );
            }
        }
    }
    plan
}

/// What is to be done about the triggers of each table, in words and in SQL: first what goes, which needs the stronger lock.
fn trigger_steps<'a>(
    installed: &'a Installed,
    wanted: &'a BTreeMap<Place, (Trigger, String)>,
) -> BTreeMap<(&'a str, &'a str), Vec<(String, String)>> {
    let mut steps: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for (place, (function, enabled)) in &installed.triggers {
        let is_wanted = wanted.get(place).is_some_and(|(_, wanted)| wanted == function);
        if !is_wanted || !enabled {
            let (schema, table, name) = place;
            let why = if *enabled { "" } else { ", which is disabled" };
            steps.entry((schema.as_str(), table.as_str())).or_default().push((
                format!("drop trigger {name} on {schema}.{table}{why}"),
                format!("drop trigger {} on {}.{}", identifier(name), identifier(schema), identifier(table)),
            ));
        }
    }
    for (place, (trigger, function)) in wanted {
        if installed.triggers.get(place) != Some(&(function.clone(), true)) {
            let (schema, table, name) = place;
            steps.entry((schema.as_str(), table.as_str())).or_default().push((
                format!("create trigger {name} on {schema}.{table}"),
                Trigger::definition(*trigger, schema, table, function),
            ));
        }
    }
    steps
}

impl Plan {
    /// The steps by what may be done in a transaction of its own.
    pub(super) fn parts(&self) -> impl Iterator<Item = &[Step]> {
        self.steps.chunk_by(|one, next| one.part == next.part)
    }

    fn step(&mut self, part: &str, what: String, sql: String) {
        // A name may hold anything, and what is printed is one line, a comment in the script.
        let line = |text: &str| text.replace(char::is_control, " ");
        self.steps.push(Step { what: line(&what), sql, part: line(part) });
    }

    fn function(&mut self, installed: &Installed, function: &Function, part: &str) {
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
            part,
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
