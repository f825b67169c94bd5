//! t
use std::time::Instant;
#[tokio::main]
async fn main() {
    for _ in 0..4 {
        let t = Instant::now();
        let d = devstack::StackDirectory::create().expect("x");
        println!("dir {:?}", t.elapsed());
        let p = devstack::Postgres::start_in(&d, Default::default()).await.expect("x");
        println!("pg {:?}", t.elapsed());
        let n = devstack::Nats::start_in(&d, Default::default()).await.expect("x");
        println!("nats {:?}", t.elapsed());
        let r = devstack::Redis::start_in(&d, Default::default()).await.expect("x");
        println!("redis {:?}", t.elapsed());
        drop(r);
        println!("drop redis {:?}", t.elapsed());
        drop(n);
        println!("drop nats {:?}", t.elapsed());
        drop(p);
        println!("drop pg {:?}", t.elapsed());
        drop(d);
        println!("drop dir {:?}", t.elapsed());
        let t = Instant::now();
        let s = devstack::Stack::start(Default::default()).await.expect("x");
        println!("-- stack {:?}", t.elapsed());
        let t = Instant::now();
        drop(s);
        println!("-- drop {:?}", t.elapsed());
    }
}
