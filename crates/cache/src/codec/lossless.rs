//! Finds values that JSON does not give back as they were: numbers that it does not have, and `Some` of something that is
//! written as `null`, which is read as `None`.

use std::fmt::Display;

use serde::ser::{
    Error, Serialize, SerializeMap, SerializeSeq, SerializeStruct, SerializeStructVariant, SerializeTuple,
    SerializeTupleStruct, SerializeTupleVariant, Serializer,
};

/// The form in which JSON writes a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Null,
    Other,
}

/// Why a value would come back as another.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Lossy(String);

impl Error for Lossy {
    fn custom<T: Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

/// Walks through a value as a serializer does, and writes nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Check;

type Checked = Result<Form, Lossy>;

fn number(is_finite: bool) -> Checked {
    if is_finite { Ok(Form::Other) } else { Err(Lossy("JSON has no number for NaN and infinities".into())) }
}

/// Methods for values of which each is something else than `null`.
macro_rules! other {
    ($($method:ident: $type:ty),*) => {
        $(fn $method(self, _: $type) -> Checked { Ok(Form::Other) })*
    };
}

impl Serializer for Check {
    type Ok = Form;
    type Error = Lossy;
    type SerializeSeq = Self;
    type SerializeTuple = Self;
    type SerializeTupleStruct = Self;
    type SerializeTupleVariant = Self;
    type SerializeMap = Self;
    type SerializeStruct = Self;
    type SerializeStructVariant = Self;

    other!(
        serialize_bool: bool, serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64,
        serialize_i128: i128, serialize_u8: u8, serialize_u16: u16, serialize_u32: u32, serialize_u64: u64,
        serialize_u128: u128, serialize_char: char, serialize_str: &str, serialize_bytes: &[u8]
    );

    fn serialize_f32(self, value: f32) -> Checked {
        number(value.is_finite())
    }

    fn serialize_f64(self, value: f64) -> Checked {
        number(value.is_finite())
    }

    fn serialize_none(self) -> Checked {
        Ok(Form::Null)
    }

    fn serialize_unit(self) -> Checked {
        Ok(Form::Null)
    }

    fn serialize_unit_struct(self, _: &'static str) -> Checked {
        Ok(Form::Null)
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Checked {
        match value.serialize(self)? {
            Form::Null => Err(Lossy("Some of a value that is null would be read as None".into())),
            Form::Other => Ok(Form::Other),
        }
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, _: &'static str) -> Checked {
        Ok(Form::Other)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Checked {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        value: &T,
    ) -> Checked {
        value.serialize(self).map(|_| Form::Other)
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Self, Lossy> {
        Ok(self)
    }

    fn serialize_tuple(self, _: usize) -> Result<Self, Lossy> {
        Ok(self)
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Self, Lossy> {
        Ok(self)
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self, Lossy> {
        Ok(self)
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Self, Lossy> {
        Ok(self)
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Self, Lossy> {
        Ok(self)
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self, Lossy> {
        Ok(self)
    }

    fn collect_str<T: Display + ?Sized>(self, _: &T) -> Checked {
        Ok(Form::Other)
    }
}

/// The traits of compound values: each part is checked, and the whole is no `null`.
macro_rules! parts {
    ($($part:ident::$method:ident($($name:ty)?)),* $(,)?) => {
        $(impl $part for Check {
            type Ok = Form;
            type Error = Lossy;

            fn $method<T: Serialize + ?Sized>(&mut self, $(_: $name,)? value: &T) -> Result<(), Lossy> {
                value.serialize(*self).map(drop)
            }

            fn end(self) -> Checked {
                Ok(Form::Other)
            }
        })*
    };
}

parts!(
    SerializeSeq::serialize_element(),
    SerializeTuple::serialize_element(),
    SerializeTupleStruct::serialize_field(),
    SerializeTupleVariant::serialize_field(),
    SerializeStruct::serialize_field(&'static str),
    SerializeStructVariant::serialize_field(&'static str),
);

impl SerializeMap for Check {
    type Ok = Form;
    type Error = Lossy;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), Lossy> {
        key.serialize(*self).map(drop)
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Lossy> {
        value.serialize(*self).map(drop)
    }

    fn end(self) -> Checked {
        Ok(Form::Other)
    }
}
