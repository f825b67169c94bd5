//! Storage that a NATS account uses and may use.

use serde_json::Value;

/// File storage of JetStream, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// What streams hold, or have reserved by a size limit of their own.
    pub used_bytes: i64,
    /// Most that they may hold; none if the account has no limit.
    pub limit_bytes: Option<i64>,
}

impl Account {
    /// Reads the answer to `$JS.API.INFO`. Of an account with tiers the fullest one counts.
    pub(super) fn parse(answer: &[u8]) -> Result<Self, async_nats::Error> {
        let answer: Value = serde_json::from_slice(answer)?;
        if let Some(error) = answer.get("error") {
            let (text, code) = (&error["description"], &error["err_code"]);
            return Err(format!("{} (error code {code})", text.as_str().unwrap_or_default()).into());
        }
        let tiers = answer["tiers"].as_object().into_iter().flat_map(|tiers| tiers.values());
        let fullest = tiers
            .map(of)
            .max_by_key(|tier| tier.limit_bytes.map_or(0, |limit| tier.used_bytes * 100 / limit));
        Ok(fullest.unwrap_or_else(|| of(&answer)))
    }
}

fn of(tier: &Value) -> Account {
    let number = |value: &Value| value.as_i64().unwrap_or_default();
    let limit = number(&tier["limits"]["max_storage"]);
    Account {
        used_bytes: number(&tier["storage"]).max(number(&tier["reserved_storage"])),
        limit_bytes: (limit > 0).then_some(limit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_and_limit_are_read_with_and_without_tiers() {
        let of = |answer: &str| Account::parse(answer.as_bytes()).unwrap();
        let plain = of(r#"{"storage":5,"reserved_storage":7,"limits":{"max_storage":10}}"#);
        assert_eq!(plain, Account { used_bytes: 7, limit_bytes: Some(10) });
        let free = of(r#"{"storage":5,"limits":{"max_storage":-1}}"#);
        assert_eq!(free, Account { used_bytes: 5, limit_bytes: None });
        let tiers = of(r#"{"storage":5,"limits":{"max_storage":0},"tiers":{
            "R1":{"storage":1,"limits":{"max_storage":100}},"R3":{"storage":9,"limits":{"max_storage":10}}}}"#);
        assert_eq!(tiers, Account { used_bytes: 9, limit_bytes: Some(10) });
        let error =
            Account::parse(br#"{"error":{"err_code":10039,"description":"not enabled"}}"#).unwrap_err();
        assert_eq!(error.to_string(), "not enabled (error code 10039)");
    }
}
