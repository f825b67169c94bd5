//! Whatever comes over the connection: it is decoded or refused, and never a panic.
#![expect(clippy::unwrap_used, reason = "a failure in a test is a panic")]

use std::sync::Arc;

use proptest::prelude::*;
use rules::Rules;
use wal::pgoutput::{DecodeError, Message, OldTuple, ReplicaIdentity, Value, decode};
use wal::publication::Tables;
use wal::{Assembler, AssemblyError, Lsn, Piece};

/// Writes messages as the server does.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn of(tag: u8) -> Self {
        Self(vec![tag])
    }

    fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    fn text(mut self, text: &str) -> Self {
        self.0.extend(text.as_bytes());
        self.u8(0)
    }

    fn tuple(mut self, mark: u8, values: &[Option<&str>]) -> Self {
        self = self.u8(mark).u16(u16::try_from(values.len()).unwrap());
        for value in values {
            self = match value {
                None => self.u8(b'n'),
                Some("<unchanged>") => self.u8(b'u'),
                Some(text) => {
                    let mut with_length = self.u8(b't').u32(u32::try_from(text.len()).unwrap());
                    with_length.0.extend(text.as_bytes());
                    with_length
                }
            };
        }
        self
    }
}

fn relation(xid: Option<u32>) -> Vec<u8> {
    let head = xid.map_or(Bytes::of(b'R'), |xid| Bytes::of(b'R').u32(xid));
    let head = head.u32(7).text("public").text("users").u8(b'd').u16(2);
    head.u8(1).text("id").u32(20).u32(0).u8(0).text("name").u32(25).u32(0).0
}

fn insert(xid: Option<u32>, id: u32) -> Vec<u8> {
    let head = xid.map_or(Bytes::of(b'I'), |xid| Bytes::of(b'I').u32(xid));
    head.u32(7).tuple(b'N', &[Some(&id.to_string()), Some("x")]).0
}

fn begin(xid: u32) -> Vec<u8> {
    Bytes::of(b'B').u64(500).u64(0).u32(xid).0
}

fn commit() -> Vec<u8> {
    Bytes::of(b'C').u8(0).u64(500).u64(600).u64(0).0
}

fn stream_commit(xid: u32) -> Vec<u8> {
    Bytes::of(b'c').u32(xid).u8(0).u64(500).u64(600).u64(0).0
}

fn stream_start(xid: u32) -> Vec<u8> {
    Bytes::of(b'S').u32(xid).u8(1).0
}

fn assembler() -> Assembler {
    let rules = "[[table]]\nname = \"users\"\nkeys = [\"user:{id}\"]\non_truncate = [\"user:\"]";
    Assembler::new(Arc::new(Rules::parse("rules.toml", rules).unwrap()), Tables::default(), Vec::new())
}

/// Gives the primary keys of the rows to `expand` as well.
fn expanding() -> Assembler {
    let rules = "[[table]]\nname = \"users\"\non_truncate = \"ignore\"\n[[table.expand]]\nsql = \"select 'x' where 1 = any($1)\"";
    let rules = Arc::new(Rules::parse("rules.toml", rules).unwrap());
    Assembler::new(rules, Tables::default(), vec![Some("id".to_owned())])
}

/// Everything that comes out, part by part.
fn feed(assembler: &mut Assembler, messages: &[Vec<u8>]) -> Result<Vec<Piece>, AssemblyError> {
    let mut pieces = Vec::new();
    for message in messages {
        assembler.feed(message)?;
        while let Some(piece) = assembler.next_piece() {
            pieces.push(piece);
        }
    }
    Ok(pieces)
}

fn keys(pieces: &[Piece]) -> Vec<&str> {
    let changes = pieces.iter().flat_map(|piece| &piece.topics);
    let mut keys: Vec<&str> =
        changes.flat_map(|(_, changes)| &changes.keys).map(event::CacheKey::as_str).collect();
    keys.sort_unstable();
    keys
}

#[test]
fn tuples_say_what_is_null_unchanged_or_only_the_identity() {
    let update = Bytes::of(b'U')
        .u32(7)
        .tuple(b'K', &[Some("1"), None])
        .tuple(b'N', &[Some("2"), Some("<unchanged>")])
        .0;
    let Message::Update { xid: None, relation: 7, old: Some(OldTuple::Key(old)), new } =
        decode(&update, false).unwrap()
    else {
        panic!("not an update with an old key")
    };
    assert_eq!(old, [Value::Text("1"), Value::Null]);
    assert_eq!(new, [Value::Text("2"), Value::Unchanged]);
    let Message::Relation(relation) = decode(&relation(None), false).unwrap() else {
        panic!("not a relation")
    };
    assert_eq!(
        (relation.identity, relation.columns[0].is_key, relation.columns[1].is_key),
        (ReplicaIdentity::Default, true, false)
    );
}

#[test]
fn what_is_not_a_message_is_refused_by_name() {
    assert_eq!(decode(b"", false), Err(DecodeError::Truncated));
    assert_eq!(decode(b"?", false), Err(DecodeError::UnknownMessage(b'?')));
    assert_eq!(decode(&Bytes::of(b'I').u32(7).u8(b'X').0, false), Err(DecodeError::UnknownMark(b'X')));
    // Says that it has 65,535 columns, and ends.
    assert_eq!(decode(&Bytes::of(b'I').u32(7).u8(b'N').u16(u16::MAX).0, false), Err(DecodeError::Truncated));
}

#[test]
fn a_transaction_comes_out_at_its_commit_with_each_key_once() {
    let mut assembler = assembler();
    let messages = [begin(9), relation(None), insert(None, 1), insert(None, 2), insert(None, 1)];
    assert!(feed(&mut assembler, &messages).unwrap().is_empty(), "it has not ended");
    let pieces = feed(&mut assembler, &[commit()]).unwrap();
    assert_eq!(keys(&pieces), ["user:1", "user:2"]);
    assert_eq!((pieces.len(), pieces[0].commit.xid, pieces[0].end_lsn), (1, 9, Some(Lsn(600))));
}

#[test]
fn a_large_transaction_is_given_away_in_parts_of_which_the_last_moves_the_position() {
    let mut messages = vec![begin(9), relation(None)];
    messages.extend((0..3500).map(|id| insert(None, id)));
    messages.push(commit());
    let pieces = feed(&mut assembler(), &messages).unwrap();
    assert_eq!(keys(&pieces).len(), 3500);
    assert!(pieces.iter().all(|piece| piece.key_count() <= 1000));
    let ends: Vec<bool> = pieces.iter().map(Piece::is_last).collect();
    assert_eq!(ends, [false, false, false, true]);
}

#[test]
fn streamed_transactions_interleave_and_lose_what_their_subtransactions_took_back() {
    let mut assembler = assembler();
    let stream = |top: u32, changes: &[(u32, u32)]| {
        let mut messages = vec![stream_start(top), relation(Some(top))];
        messages.extend(changes.iter().map(|&(xid, id)| insert(Some(xid), id)));
        messages.push(vec![b'E']);
        messages
    };
    feed(&mut assembler, &stream(10, &[(10, 1), (11, 2), (12, 3)])).unwrap();
    feed(&mut assembler, &stream(20, &[(20, 5)])).unwrap();
    feed(&mut assembler, &stream(10, &[(11, 4), (13, 6)])).unwrap();
    let held = assembler.held_bytes();
    assert!(held > 0);
    // A subtransaction, then the other transaction as a whole.
    let abort = |xid: u32, subxid: u32| Bytes::of(b'A').u32(xid).u32(subxid).0;
    assert!(feed(&mut assembler, &[abort(10, 11), abort(20, 20)]).unwrap().is_empty());
    assert!(assembler.held_bytes() < held);
    let pieces = feed(&mut assembler, &[stream_commit(10)]).unwrap();
    assert_eq!(keys(&pieces), ["user:1", "user:3", "user:6"]);
    assert_eq!(assembler.held_bytes(), 0);
    assert!(feed(&mut assembler, &[stream_commit(20)]).unwrap().iter().all(Piece::is_empty));
}

#[test]
fn primary_keys_that_expand_is_to_map_come_with_the_transaction_and_in_parts() {
    let of = |pieces: &[Piece]| -> Vec<usize> {
        let keys = |piece: &Piece| piece.primary_keys.iter().map(|(_, keys)| keys.len()).sum();
        pieces.iter().map(keys).collect()
    };
    let mut messages = vec![begin(1), relation(None)];
    messages.extend((0..2_500).map(|id| insert(None, id.min(2_399))));
    messages.push(commit());
    let pieces = feed(&mut expanding(), &messages).unwrap();
    assert_eq!(
        of(&pieces).iter().sum::<usize>(),
        2_400,
        "a row that is changed again in the same part counts once"
    );
    assert!(pieces.len() >= 3 && pieces.last().unwrap().is_last());
    // Streamed, with a subtransaction that is taken back.
    let taken_back = Bytes::of(b'A').u32(1).u32(2).0;
    let mut messages = vec![stream_start(1), relation(Some(1))];
    messages.extend((0..2_500).map(|id| insert(Some(1), id)));
    messages.extend([insert(Some(2), 9_999), Bytes::of(b'E').0, taken_back, stream_commit(1)]);
    let pieces = feed(&mut expanding(), &messages).unwrap();
    assert_eq!(of(&pieces), [1_000, 1_000, 500]);
    assert!(
        pieces
            .iter()
            .flat_map(|piece| &piece.primary_keys)
            .all(|(table, keys)| *table == 0 && !keys.contains(&"9999".to_owned()))
    );
}

#[test]
fn more_keys_than_are_kept_are_refused_before_the_memory_is_gone() {
    let mut assembler = assembler();
    feed(&mut assembler, &[stream_start(10), relation(Some(10))]).unwrap();
    let long = |id: u32| {
        let id = format!("{id:0900}");
        Bytes::of(b'I').u32(10).u32(7).tuple(b'N', &[Some(&id), None]).0
    };
    let refused = (0..100_000).find_map(|id| assembler.feed(&long(id)).err());
    assert!(matches!(refused, Some(AssemblyError::TooManyKeys)));
    assert!(assembler.held_bytes() < wal::MAX_HELD_BYTES + (16 << 20), "{}", assembler.held_bytes());
}

/// `pg_logical_emit_message` at a position.
fn logical(transactional: bool, lsn: u64, prefix: &str) -> Vec<u8> {
    let mut message = Bytes::of(b'M').u8(u8::from(transactional)).u64(lsn).text(prefix).u32(2).0;
    message.extend(b"{}");
    message
}

#[test]
fn only_transactional_messages_with_our_prefix_are_events() {
    let mut assembler = assembler();
    let messages = [logical(false, 1, "outbox"), logical(false, 1, "outbox-heartbeat")];
    assert!(feed(&mut assembler, &messages).unwrap().is_empty());
    let messages = [begin(9), logical(true, 1, "outbox"), logical(true, 1, "theirs"), commit()];
    let pieces = feed(&mut assembler, &messages).unwrap();
    assert_eq!((pieces.len(), pieces[0].events.len()), (1, 1));
}

#[test]
fn a_message_without_a_transaction_moves_the_position_but_never_past_what_is_not_whole() {
    let mut assembler = assembler();
    assert_eq!(assembler.take_passed(), None);
    feed(&mut assembler, &[logical(false, 77, "outbox-heartbeat")]).unwrap();
    assert_eq!(assembler.take_passed(), Some(Lsn(77)));
    assert_eq!(assembler.take_passed(), None, "said once");
    feed(&mut assembler, &[begin(9), logical(true, 78, "theirs"), logical(false, 79, "theirs")]).unwrap();
    assert_eq!(assembler.take_passed(), None, "the transaction has not ended");
    feed(&mut assembler, &[commit(), logical(false, 99, "theirs")]).unwrap();
    assert_eq!(assembler.take_passed(), Some(Lsn(99)));
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(messages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..64), 0..40)) {
        let mut assembler = assembler();
        for message in &messages {
            let _ = decode(message, false);
            let _ = decode(message, true);
            if feed(&mut assembler, std::slice::from_ref(message)).is_err() {
                break;
            }
        }
    }

    #[test]
    fn no_damaged_stream_makes_it_panic(at in 0_usize..9, byte in 0_usize..40, value: u8, cut in 0_usize..60) {
        let mut messages = vec![
            begin(9), relation(None), insert(None, 1), commit(),
            stream_start(10), relation(Some(10)), insert(Some(11), 2), vec![b'E'], stream_commit(10),
        ];
        let message = &mut messages[at];
        if let Some(damaged) = message.get_mut(byte) {
            *damaged = value;
        }
        message.truncate(cut);
        let _ = feed(&mut assembler(), &messages);
    }
}
