mod lossless;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Between values of type `T` and the bytes at their key, which any client in any language may read.
///
/// Two come with the crate: [`Json`] and [`Raw`]. Implement it for another format.
pub trait Codec<T> {
    /// The bytes to store for `value`. [`decode`](Self::decode) must make the same value of them: a hit returns that.
    ///
    /// # Errors
    /// [`CodecError`]; the value is then returned to the caller but not cached.
    fn encode(&self, value: &T) -> Result<Vec<u8>, CodecError>;

    /// The value that `bytes` stand for.
    ///
    /// # Errors
    /// [`CodecError`]; the value is then loaded again and replaced.
    fn decode(&self, bytes: &[u8]) -> Result<T, CodecError>;

    /// Whether `bytes` say that there is no such thing, which is remembered for a shorter time.
    fn is_absent(&self, bytes: &[u8]) -> bool;
}

/// A value and its bytes do not go together.
#[derive(Debug, thiserror::Error)]
#[error("value does not fit its encoding")]
pub struct CodecError(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// Values as JSON documents; `None` is `null`.
///
/// Values that would come back as others are not cached: numbers that JSON does not have (NaN, infinities), and `Some` of a
/// value that is written as `null` (`Some(())`, `Some(None)`), wherever they are in the value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Json;

impl<T: Serialize + DeserializeOwned> Codec<T> for Json {
    fn encode(&self, value: &T) -> Result<Vec<u8>, CodecError> {
        value.serialize(lossless::Check).map_err(|error| CodecError(error.into()))?;
        serde_json::to_vec(value).map_err(|error| CodecError(error.into()))
    }

    fn decode(&self, bytes: &[u8]) -> Result<T, CodecError> {
        serde_json::from_slice(bytes).map_err(|error| CodecError(error.into()))
    }

    fn is_absent(&self, bytes: &[u8]) -> bool {
        bytes == b"null"
    }
}

/// Bytes as they are; `None` is [`Raw::ABSENT`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Raw;

impl Raw {
    /// What stands at the key of a value that does not exist. A value that happens to be these bytes is not cached.
    pub const ABSENT: &'static [u8] = b"\x1fabsent";
}

impl Codec<Vec<u8>> for Raw {
    fn encode(&self, value: &Vec<u8>) -> Result<Vec<u8>, CodecError> {
        if value == Self::ABSENT {
            return Err(CodecError("the value is the mark of absence".into()));
        }
        Ok(value.clone())
    }

    fn decode(&self, bytes: &[u8]) -> Result<Vec<u8>, CodecError> {
        if bytes == Self::ABSENT {
            return Err(CodecError("there is no value".into()));
        }
        Ok(bytes.to_vec())
    }

    fn is_absent(&self, bytes: &[u8]) -> bool {
        bytes == Self::ABSENT
    }
}

impl Codec<Option<Vec<u8>>> for Raw {
    fn encode(&self, value: &Option<Vec<u8>>) -> Result<Vec<u8>, CodecError> {
        value.as_ref().map_or_else(|| Ok(Self::ABSENT.to_vec()), |value| self.encode(value))
    }

    fn decode(&self, bytes: &[u8]) -> Result<Option<Vec<u8>>, CodecError> {
        if bytes == Self::ABSENT { Ok(None) } else { Ok(Some(bytes.to_vec())) }
    }

    fn is_absent(&self, bytes: &[u8]) -> bool {
        bytes == Self::ABSENT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_values_are_plain_bytes_in_both_codecs() {
        assert_eq!(Json.encode(&None::<u32>).unwrap(), b"null");
        assert_eq!(Json.encode(&Some(7)).unwrap(), b"7");
        let none: Option<Vec<u8>> = None;
        assert_eq!(Raw.encode(&none).unwrap(), b"\x1fabsent");
        let decoded: Option<Vec<u8>> = Raw.decode(b"\x1fabsent").unwrap();
        assert_eq!(decoded, None);
    }

    /// Returns what a hit would return for `value`.
    fn hit<T: Serialize + DeserializeOwned>(value: &T) -> Option<T> {
        Some(Json.decode(&Json.encode(value).ok()?).unwrap())
    }

    #[derive(Debug, Clone, PartialEq, Serialize, serde::Deserialize)]
    enum Shape {
        Nothing,
        Wrapped(Option<f64>),
        Pair(u8, Option<()>),
        Named { at: Option<f32>, list: Vec<Option<u8>> },
    }

    #[test]
    fn json_that_would_come_back_as_another_value_is_not_cached() {
        assert_eq!(hit(&Some(f64::NAN)), None);
        assert_eq!(hit(&f64::INFINITY), None);
        assert_eq!(hit(&Some(())), None);
        assert_eq!(hit(&Some(None::<String>)), None);
        assert_eq!(hit(&Some(serde_json::Value::Null)), None);
        assert_eq!(hit(&vec![Some(f64::NAN)]), None);
        assert_eq!(hit(&(1, Some(f32::NAN))), None);
        assert_eq!(
            hit(&std::collections::BTreeMap::from([("k", Some(Some(())))].map(|(k, v)| (k.to_owned(), v)))),
            None
        );
        for shape in [
            Shape::Wrapped(Some(f64::NAN)),
            Shape::Pair(1, Some(())),
            Shape::Named { at: Some(f32::NAN), list: Vec::new() },
        ] {
            assert_eq!(hit(&shape), None, "{shape:?}");
        }
    }

    #[test]
    fn everything_else_comes_back_from_json_as_it_was() {
        fn comes_back<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(value: &T) {
            assert_eq!(hit(value).as_ref(), Some(value));
        }
        comes_back(&None::<f64>);
        comes_back(&Some(1.5));
        comes_back(&());
        comes_back(&serde_json::json!({ "a": null, "b": [1, null, { "c": -0.25 }] }));
        comes_back(&Some("null".to_owned()));
        comes_back(&(u64::MAX, i64::MIN, 'x', true, vec![None, Some(7)]));
        comes_back(&Shape::Nothing);
        comes_back(&Shape::Wrapped(None));
        comes_back(&Shape::Pair(0, None));
        comes_back(&Shape::Named { at: Some(-0.0), list: vec![None, Some(0)] });
    }

    #[test]
    fn a_raw_value_that_looks_absent_is_not_cached() {
        assert!(Raw.encode(&Raw::ABSENT.to_vec()).is_err());
        assert!(Raw.encode(&Some(Raw::ABSENT.to_vec())).is_err());
        assert_eq!(Raw.encode(&Some(Vec::new())).unwrap(), b"");
    }
}
