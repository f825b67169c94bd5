use event::{History, TransactionId};

/// A mark as it stands in Redis: the transaction that made it and a number made by chance, which no other mark has.
///
/// The number tells a mark from that of a later transaction with the same id. A server that crashes assigns again the
/// ids that it has not written to the disk.
///
/// As text `<history>:<xid>:<nonce>`, or the `xid` alone if a writer of an older version made the mark. Such a mark has no
/// number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mark {
    transaction: TransactionId,
    nonce: u64,
}

impl Mark {
    /// A new mark of a transaction.
    #[must_use]
    pub fn generate(transaction: TransactionId) -> Self {
        let nonce = if transaction.history.is_some() { rand::random() } else { 0 };
        Self { transaction, nonce }
    }

    /// The transaction that made it.
    #[must_use]
    pub fn transaction(self) -> TransactionId {
        self.transaction
    }

    /// Reads the text of a mark; `None` if it is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mark = match text.split_once(':') {
            None => Self { transaction: TransactionId { history: None, xid: text.parse().ok()? }, nonce: 0 },
            Some((history, rest)) => {
                let (xid, nonce) = rest.split_once(':')?;
                let history: History = history.parse().ok()?;
                let transaction = TransactionId { history: Some(history), xid: xid.parse().ok()? };
                Self { transaction, nonce: u64::from_str_radix(nonce, 16).ok()? }
            }
        };
        (mark.to_string() == text).then_some(mark)
    }

    /// Mark and key of a registry's member, `<mark>:<key>`.
    pub(crate) fn parse_member(member: &str) -> Option<(&str, Self)> {
        let colons = if member.starts_with(|first: char| first.is_ascii_digit()) { 0 } else { 2 };
        let (at, _) = member.match_indices(':').nth(colons)?;
        Some((&member[at + 1..], Self::parse(&member[..at])?))
    }

    /// The registry's member for this mark of `key`.
    pub(crate) fn member(self, key: &str) -> String {
        format!("{self}:{key}")
    }
}

impl std::fmt::Display for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.transaction.history {
            Some(_) => write!(f, "{}:{:016x}", self.transaction, self.nonce),
            None => self.transaction.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_mark() -> impl Strategy<Value = Mark> {
        (any::<Option<(u32, u32)>>(), any::<u64>(), any::<u64>()).prop_map(|(history, xid, nonce)| {
            let history = history.map(|(database, timeline)| {
                format!("d{database:010x}.{timeline}").parse::<History>().unwrap()
            });
            let nonce = if history.is_some() { nonce } else { 0 };
            Mark { transaction: TransactionId { history, xid }, nonce }
        })
    }

    proptest! {
        #[test]
        fn a_registry_member_names_its_mark_and_its_key(mark in any_mark(), key in "[{}a1d:.]{1,12}|\\PC{1,40}") {
            prop_assert_eq!(Mark::parse(&mark.to_string()), Some(mark));
            let member = mark.member(&key);
            prop_assert_eq!(Mark::parse_member(&member), Some((key.as_str(), mark)));
        }

        #[test]
        fn what_is_read_is_written_back_unchanged(text in "[d0-9a-f:.]{0,40}|\\PC{0,40}") {
            if let Some((key, mark)) = Mark::parse_member(&text) {
                prop_assert_eq!(mark.member(key), text);
            }
        }
    }

    #[test]
    fn two_marks_of_one_transaction_differ() {
        let transaction = TransactionId { history: Some("d0000000001.1".parse().unwrap()), xid: 733 };
        let marks = [Mark::generate(transaction), Mark::generate(transaction)];
        assert_ne!(marks[0], marks[1]);
        assert!(marks[0].to_string().starts_with(&format!("{transaction}:")));
    }

    #[test]
    fn a_mark_of_an_older_writer_is_its_transaction_id() {
        let mark = Mark::parse("733").unwrap();
        assert_eq!((mark.to_string().as_str(), mark.transaction().history), ("733", None));
        assert_eq!(Mark::parse_member("733:user:1"), Some(("user:1", mark)));
        // What would not be written back as it was read is none: nobody could remove it.
        assert_eq!(Mark::parse("0733"), None);
    }
}
