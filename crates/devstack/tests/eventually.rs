//! The polling helper.

use std::time::Duration;

use devstack::eventually;

#[tokio::test]
async fn a_value_is_returned_once_it_is_there() {
    let mut attempts = 0;
    let value = eventually(Duration::from_secs(5), async || {
        attempts += 1;
        if attempts < 3 { Err("too early") } else { Ok(attempts) }
    })
    .await;
    assert_eq!(value, 3);
    eventually(Duration::from_secs(5), async || true).await;
    assert_eq!(eventually(Duration::from_secs(5), || async { Some(7) }).await, 7);
}

#[tokio::test]
async fn the_panic_names_the_last_error_and_the_caller() {
    let line = line!() + 2;
    let panic = tokio::spawn(async {
        eventually(Duration::from_millis(30), async || Err::<(), _>("no luck")).await;
    });
    let panic = panic.await.unwrap_err().into_panic();
    let message = panic.downcast_ref::<String>().unwrap();
    assert!(message.contains("no luck") && message.contains(&format!("eventually.rs:{line}")), "{message}");
}

#[tokio::test]
#[should_panic(expected = "hung")]
async fn an_attempt_that_hangs_is_cut_off_at_the_deadline() {
    eventually(Duration::from_millis(30), std::future::pending::<bool>).await;
}
