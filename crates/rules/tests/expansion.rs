//! Which keys a changed row invalidates.

#![expect(clippy::unwrap_used, reason = "a failure in a test is a panic")]

use rules::{Cell, Image, JsonImage, Rules, TableRules};

const RULES: &str = r#"
[[table]]
name = "users"
columns = ["name"]
keys = ["user:{id}:profile", "tenant:{tenant_id}:user:{email}"]
on_truncate = "ignore"

[[table]]
name = "posts"
keys = ["post:{slug}"]
when = { column = "status", in = ["published", "archived"] }
on_truncate = "ignore"

[[table]]
name = "live"
keys = ["live:{id}"]
when = { not = { column = "deleted", equals = true } }
on_truncate = "ignore"

[[table]]
name = "set"
keys = ["set:{id}"]
when = { column = "at", is_null = false }
on_truncate = "ignore"
"#;

fn table(name: &str) -> TableRules {
    Rules::parse("rules.toml", RULES).unwrap().table("public", name).unwrap().clone()
}

fn image(text: &str) -> JsonImage {
    JsonImage::parse(text).unwrap()
}

fn keys(table: &TableRules, old: Option<&str>, new: Option<&str>) -> Vec<String> {
    let (old, new) = (old.map(image), new.map(image));
    let as_image = |image: &'static JsonImage| image as &dyn Image;
    let leak = |image: JsonImage| as_image(Box::leak(Box::new(image)));
    let expansion = table.keys(old.map(leak), new.map(leak)).unwrap();
    assert!(expansion.refused.is_empty());
    expansion.keys.into_iter().map(event::CacheKey::into_string).collect()
}

#[test]
fn old_and_new_image_are_both_expanded_and_no_key_comes_twice() {
    let users = table("users");
    let before = r#"{"id":1,"tenant_id":5,"email":"a@x","name":"A"}"#;
    let moved = r#"{"id":1,"tenant_id":6,"email":"a@x","name":"A"}"#;
    assert_eq!(keys(&users, None, Some(before)), ["user:1:profile", "tenant:5:user:a@x"]);
    assert_eq!(keys(&users, Some(before), None), ["user:1:profile", "tenant:5:user:a@x"]);
    let both = ["user:1:profile", "tenant:5:user:a@x", "tenant:6:user:a@x"];
    assert_eq!(keys(&users, Some(before), Some(moved)), both);
}

#[test]
fn an_update_of_unwatched_columns_invalidates_nothing() {
    let users = table("users");
    let before = r#"{"id":1,"tenant_id":5,"email":"a@x","name":"A","seen":1}"#;
    let seen = r#"{"id":1,"tenant_id":5,"email":"a@x","name":"A","seen":2}"#;
    let renamed = r#"{"id":1,"tenant_id":5,"email":"a@x","name":"B","seen":1}"#;
    assert!(keys(&users, Some(before), Some(seen)).is_empty());
    assert_eq!(keys(&users, Some(before), Some(renamed)).len(), 2);
    // Without watched columns every UPDATE counts.
    let post = r#"{"slug":"a","status":"published"}"#;
    assert_eq!(keys(&table("posts"), Some(post), Some(post)), ["post:a"]);
}

#[test]
fn a_null_in_a_template_yields_no_key() {
    let row = r#"{"id":1,"tenant_id":null,"email":"a@x","name":"A"}"#;
    assert_eq!(keys(&table("users"), None, Some(row)), ["user:1:profile"]);
}

#[test]
fn each_image_counts_only_if_the_condition_holds_on_it() {
    let posts = table("posts");
    let draft = r#"{"slug":"a","status":"draft"}"#;
    let published = r#"{"slug":"b","status":"published"}"#;
    let unknown = r#"{"slug":"c","status":null}"#;
    assert!(keys(&posts, Some(draft), Some(draft)).is_empty());
    assert_eq!(keys(&posts, Some(draft), Some(published)), ["post:b"]);
    assert_eq!(keys(&posts, Some(published), Some(draft)), ["post:b"]);
    assert!(keys(&posts, None, Some(unknown)).is_empty());
    let live = table("live");
    assert!(keys(&live, None, Some(r#"{"id":1,"deleted":true}"#)).is_empty());
    assert_eq!(keys(&live, None, Some(r#"{"id":1,"deleted":null}"#)), ["live:1"]);
    assert_eq!(keys(&table("set"), Some(r#"{"id":1,"at":null}"#), Some(r#"{"id":1,"at":"x"}"#)), ["set:1"]);
}

#[test]
fn keys_that_no_cache_key_can_be_are_skipped_and_named() {
    let row = image(&format!(r#"{{"id":1,"tenant_id":1,"email":"{}","name":""}}"#, "x".repeat(1100)));
    let expansion = table("users").keys(None, Some(&row)).unwrap();
    assert_eq!(expansion.keys.len(), 1);
    assert_eq!(
        expansion.refused[0].to_string(),
        "table public.users: key 'tenant:{tenant_id}:user:{email}' of a row was skipped: \
         cache key has 1114 bytes, the limit is 1024"
    );
    let row = image(r#"{"id":1,"tenant_id":1,"email":"a\nb","name":""}"#);
    assert_eq!(table("users").keys(None, Some(&row)).unwrap().refused.len(), 1);
}

/// An image in which `email` is a large value that was not sent.
struct NotSent(JsonImage);

impl Image for NotSent {
    fn cell(&self, column: &str) -> Cell<'_> {
        if column == "email" { Cell::Unchanged } else { self.0.cell(column) }
    }
}

#[test]
fn a_value_that_was_not_sent_is_that_of_the_old_image_or_an_error_with_the_remedy() {
    let users = table("users");
    let new = NotSent(image(r#"{"id":1,"tenant_id":6,"name":"A"}"#));
    let old = image(r#"{"id":1,"tenant_id":5,"email":"a@x","name":"A"}"#);
    let expansion = users.keys(Some(&old), Some(&new)).unwrap();
    assert_eq!(expansion.keys.last().unwrap().as_str(), "tenant:6:user:a@x");
    let error = users.keys(None, Some(&new)).unwrap_err();
    assert_eq!(error.column, "email");
    assert!(error.to_string().contains("ALTER TABLE public.users REPLICA IDENTITY FULL"), "{error}");
    let only_key = image(r#"{"id":1}"#);
    let error = users.keys(Some(&only_key), None).unwrap_err();
    assert_eq!(error.column, "tenant_id");
    assert!(error.to_string().contains("not part of the replica identity"), "{error}");
}

#[test]
fn the_values_of_a_column_come_from_the_images_that_count() {
    let values = |name: &str, old: Option<&str>, new: Option<&str>| {
        let (old, new) = (old.map(image), new.map(image));
        table(name).values(
            "id",
            old.as_ref().map(|image| image as &dyn Image),
            new.as_ref().map(|image| image as &dyn Image),
        )
    };
    let (a, b) = (r#"{"id":1,"deleted":false}"#, r#"{"id":2,"deleted":false}"#);
    assert_eq!(values("live", Some(a), Some(b)).unwrap(), ["1", "2"]);
    assert_eq!(values("live", Some(a), Some(a)).unwrap(), ["1"]);
    assert_eq!(
        values("live", Some(a), Some(r#"{"id":3,"deleted":true}"#)).unwrap(),
        ["1"],
        "it left the condition"
    );
    assert!(values("live", None, Some(r#"{"id":null,"deleted":false}"#)).unwrap().is_empty());
    let unwatched = r#"{"id":1,"name":"A","tenant_id":1,"email":"a"}"#;
    assert!(values("users", Some(unwatched), Some(unwatched)).unwrap().is_empty(), "nothing watched changed");
    assert_eq!(values("live", Some(r#"{"deleted":false}"#), None).unwrap_err().column, "id");
}
