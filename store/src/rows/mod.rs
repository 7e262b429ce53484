//! The SQL of each table, and how a row becomes a value.
//!
//! # Invariants
//! * Times are written as UTC RFC 3339 with as many digits as needed, so they do not sort as text
//!   (`…09Z` comes after `…09.5Z`): whoever orders or compares them reads them first.
//! * JSON is written as text; the reference writes it as a blob, so both are read.

pub(crate) mod images;
pub(crate) mod lifecycle;
pub(crate) mod subnets;
pub(crate) mod vms;

use std::fmt::Display;
use std::str::FromStr;

use jiff::Timestamp;
use matchlock_model::image::ImageScope;
use rusqlite::Row;
use rusqlite::types::ValueRef;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{BadRow, WriteError};

/// One row being read: names the table and the row in whatever goes wrong.
pub(crate) struct Reading<'a> {
    row: &'a Row<'a>,
    table: &'static str,
    key: String,
}

impl<'a> Reading<'a> {
    /// A row whose key, for people, is in this column.
    pub(crate) fn new(
        row: &'a Row<'a>,
        table: &'static str,
        key: &'static str,
    ) -> rusqlite::Result<Self> {
        let mut reading = Self { row, table, key: String::from("a row") };
        reading.key = reading.text(key)?;
        Ok(reading)
    }

    /// The same row, where the columns that are read next come from this table.
    pub(crate) fn of(&self, table: &'static str) -> Self {
        Self { row: self.row, table, key: self.key.clone() }
    }

    pub(crate) fn bad(&self, column: &'static str, reason: impl Display) -> rusqlite::Error {
        BadRow { table: self.table, column, key: self.key.clone(), reason: reason.to_string() }
            .into_sqlite()
    }

    fn text_or_null(&self, column: &'static str) -> rusqlite::Result<Option<&'a str>> {
        let bytes = match self.row.get_ref(column)? {
            ValueRef::Null => return Ok(None),
            ValueRef::Text(bytes) | ValueRef::Blob(bytes) => bytes,
            ValueRef::Integer(_) | ValueRef::Real(_) => {
                return Err(self.bad(column, "it is a number, not a text"));
            }
        };
        std::str::from_utf8(bytes).map(Some).map_err(|e| self.bad(column, e))
    }

    /// A text; NULL is the empty text.
    pub(crate) fn text(&self, column: &'static str) -> rusqlite::Result<String> {
        Ok(self.text_or_null(column)?.unwrap_or_default().to_owned())
    }

    /// A text that means something: an id, a phase, a time.
    pub(crate) fn parsed<T>(&self, column: &'static str) -> rusqlite::Result<T>
    where
        T: FromStr<Err: Display>,
    {
        self.text_or_null(column)?
            .unwrap_or_default()
            .parse()
            .map_err(|e: T::Err| self.bad(column, e))
    }

    /// JSON; `None` for NULL, the empty text and `null`.
    pub(crate) fn json<T: DeserializeOwned>(
        &self,
        column: &'static str,
    ) -> rusqlite::Result<Option<T>> {
        let text = self.text_or_null(column)?.unwrap_or_default();
        if text.is_empty() {
            return Ok(None);
        }
        serde_json::from_str(text).map_err(|e| self.bad(column, e))
    }

    /// An image's scope.
    pub(crate) fn scope(&self, column: &'static str) -> rusqlite::Result<ImageScope> {
        let text = self.text_or_null(column)?.unwrap_or_default();
        [ImageScope::Local, ImageScope::Registry]
            .into_iter()
            .find(|scope| scope.name() == text)
            .ok_or_else(|| self.bad(column, format_args!("unknown scope {text:?}")))
    }

    /// A number of this type; `None` for NULL.
    pub(crate) fn number_or_null<T: TryFrom<i64, Error: Display>>(
        &self,
        column: &'static str,
    ) -> rusqlite::Result<Option<T>> {
        match self.row.get_ref(column)? {
            ValueRef::Null => Ok(None),
            _ => self.number(column).map(Some),
        }
    }

    /// A number of this type.
    pub(crate) fn number<T: TryFrom<i64, Error: Display>>(
        &self,
        column: &'static str,
    ) -> rusqlite::Result<T> {
        let ValueRef::Integer(number) = self.row.get_ref(column)? else {
            return Err(self.bad(column, "it is not a whole number"));
        };
        T::try_from(number).map_err(|e| self.bad(column, e))
    }
}

/// All rows of an answer; one that cannot be read keeps no other from being read.
pub(crate) fn each<T>(
    rows: impl Iterator<Item = rusqlite::Result<T>>,
) -> rusqlite::Result<Vec<Result<T, BadRow>>> {
    rows.map(|row| row.map(Ok).or_else(|e| BadRow::taken_from(e).map(Err))).collect()
}

/// A value, or `None` if it is there and cannot be read.
pub(crate) fn readable<T>(value: rusqlite::Result<T>) -> rusqlite::Result<Option<T>> {
    value.map(Some).or_else(|e| BadRow::taken_from(e).map(|_| None))
}

/// A time as it is stored.
pub(crate) fn stored(time: Timestamp) -> String {
    time.to_string()
}

/// The JSON text of a value.
pub(crate) fn to_json<T: Serialize>(what: &'static str, value: &T) -> Result<String, WriteError> {
    serde_json::to_string(value).map_err(|e| WriteError::Json { what, reason: e.to_string() })
}

/// The JSON object of a value.
pub(crate) fn to_object<T: Serialize>(
    what: &'static str,
    value: &T,
) -> Result<Map<String, Value>, WriteError> {
    match to_value(what, value)? {
        Value::Object(object) => Ok(object),
        _ => Err(WriteError::Json { what, reason: "it is not an object".to_owned() }),
    }
}

/// A value as JSON has it.
pub(crate) fn to_value<T: Serialize>(what: &'static str, value: &T) -> Result<Value, WriteError> {
    let failed = |e: serde_json::Error| WriteError::Json { what, reason: e.to_string() };
    serde_json::to_value(value).map_err(failed)
}
