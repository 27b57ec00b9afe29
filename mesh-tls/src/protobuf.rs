//! As much of protobuf as a few messages need: fields are read one after the other, and written one after the other.
//!
//! Fields that are not known are given out like all others, so that whoever reads a message skips them, as protobuf asks for.

/// Bytes are no such message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the message cannot be read")]
pub struct InvalidMessage;

/// How protobuf writes a value.
pub(crate) const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const BYTES: u64 = 2;
const FIXED32: u64 = 5;

/// Bytes as text.
pub(crate) fn text(bytes: &[u8]) -> Result<String, InvalidMessage> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| InvalidMessage)
}

#[cfg(feature = "istio-ca")]
pub(crate) fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_varint(out, field << 3 | BYTES);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

#[cfg(feature = "istio-ca")]
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// The fields of a message that are still to be read.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

pub(crate) enum Value<'a> {
    #[cfg_attr(not(feature = "istio-ca"), expect(dead_code, reason = "no field here is a number"))]
    Number(u64),
    Bytes(&'a [u8]),
    /// Of a width that no field here has.
    Fixed,
}

impl<'a> Fields<'a> {
    pub(crate) fn next(&mut self) -> Result<Option<(u64, Value<'a>)>, InvalidMessage> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let (field, kind) = (key >> 3, key & 7);
        if field == 0 || field >= 1 << 29 {
            return Err(InvalidMessage);
        }
        let value = match kind {
            VARINT => Value::Number(self.varint()?),
            BYTES => {
                let length = usize::try_from(self.varint()?).map_err(|_| InvalidMessage)?;
                Value::Bytes(self.take(length)?)
            }
            FIXED64 => self.take(8).map(|_| Value::Fixed)?,
            FIXED32 => self.take(4).map(|_| Value::Fixed)?,
            // Groups are of a time before this service.
            _ => return Err(InvalidMessage),
        };
        Ok(Some((field, value)))
    }

    fn varint(&mut self) -> Result<u64, InvalidMessage> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(InvalidMessage);
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(InvalidMessage)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], InvalidMessage> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(InvalidMessage)?;
        self.0 = rest;
        Ok(taken)
    }
}
