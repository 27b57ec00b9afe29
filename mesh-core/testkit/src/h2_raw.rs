//! HTTP/2 as a hostile client writes it: frames with exactly the fields that it is told, legal or not.
//!
//! Every field is a literal that is never indexed, so that no compression stands between a test and the bytes. Of what
//! comes back only the fate of a stream is read: its status, its reset, or the end of the connection.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::PATIENCE;

pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;

pub(crate) const ACK: u8 = 1;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// What became of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It was answered with this status.
    Status(u16),
    /// It was reset with this error code.
    Reset(u32),
    /// The connection was given up with this error code.
    GoAway(u32),
    /// The connection was closed without a word.
    Closed,
}

/// One connection.
#[derive(Debug)]
pub struct Http2 {
    stream: TcpStream,
}

impl Http2 {
    /// Connects, and sends the preface and empty settings.
    ///
    /// # Panics
    /// When no connection can be made.
    pub async fn connect(peer: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(peer).await.expect("a connection");
        stream.write_all(PREFACE).await.expect("a preface");
        let mut this = Self { stream };
        this.frame(SETTINGS, 0, 0, &[]).await;
        this
    }

    /// Sends the head of a request.
    pub async fn headers(&mut self, id: u32, fields: &[(&[u8], &[u8])], end: bool) {
        let mut block = Vec::new();
        for (name, value) in fields {
            block.push(0x10);
            literal(&mut block, name);
            literal(&mut block, value);
        }
        self.frame(HEADERS, END_HEADERS | if end { END_STREAM } else { 0 }, id, &block).await;
    }

    /// Sends a piece of a body.
    pub async fn data(&mut self, id: u32, bytes: &[u8], end: bool) {
        self.frame(DATA, if end { END_STREAM } else { 0 }, id, bytes).await;
    }

    /// Waits for what becomes of stream `id`.
    ///
    /// # Panics
    /// When nothing does for [`PATIENCE`].
    pub async fn fate(&mut self, id: u32) -> Fate {
        timeout(PATIENCE, self.read_fate(id))
            .await
            .unwrap_or_else(|_| panic!("nothing became of stream {id}"))
    }

    /// Waits until the peer says that it takes no more streams; the error code, and the last stream that it takes.
    ///
    /// # Panics
    /// When it does not within [`PATIENCE`], or closes without a word.
    pub async fn go_away(&mut self) -> (u32, u32) {
        let said = async {
            loop {
                match self.read_frame().await {
                    Some((GOAWAY, _, payload)) => {
                        return (number(&payload, 4), number(&payload, 0) & 0x7fff_ffff);
                    }
                    Some(_) => {}
                    None => panic!("closed without a word"),
                }
            }
        };
        timeout(PATIENCE, said).await.unwrap_or_else(|_| panic!("the connection was not given up"))
    }

    async fn read_fate(&mut self, id: u32) -> Fate {
        loop {
            match self.read_frame().await {
                None => return Fate::Closed,
                Some((HEADERS, of, payload)) if of == id => return Fate::Status(status(&payload)),
                Some((RST_STREAM, of, payload)) if of == id => return Fate::Reset(number(&payload, 0)),
                Some((GOAWAY, _, payload)) if number(&payload, 4) != 0 => {
                    return Fate::GoAway(number(&payload, 4));
                }
                Some(_) => {}
            }
        }
    }

    /// The kind, stream and payload of the next frame; `None` when the connection is closed. What asks for a reply gets it.
    async fn read_frame(&mut self) -> Option<(u8, u32, Vec<u8>)> {
        let mut head = [0_u8; 9];
        self.stream.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let (kind, flags) = (head[3], head[4]);
        let of = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
        let mut payload = vec![0_u8; length];
        self.stream.read_exact(&mut payload).await.ok()?;
        match kind {
            SETTINGS if flags & ACK == 0 => self.frame(SETTINGS, ACK, 0, &[]).await,
            PING if flags & ACK == 0 => self.frame(PING, ACK, 0, &payload).await,
            _ => {}
        }
        Some((kind, of, payload))
    }

    async fn frame(&mut self, kind: u8, flags: u8, id: u32, payload: &[u8]) {
        // A peer that has given the connection up does not read on.
        let _ = self.stream.write_all(&frame(kind, flags, id, payload)).await;
    }
}

/// The bytes of a frame.
pub(crate) fn frame(kind: u8, flags: u8, id: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a small frame").to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend_from_slice(&id.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// The four bytes of a payload from `at` on; 0 when it has none there.
fn number(payload: &[u8], at: usize) -> u32 {
    payload.get(at..at + 4).map_or(0, |code| u32::from_be_bytes(code.try_into().expect("four bytes")))
}

/// A string without Huffman coding.
fn literal(block: &mut Vec<u8>, bytes: &[u8]) {
    let length = bytes.len();
    if length < 127 {
        block.push(length as u8);
    } else {
        block.push(127);
        let mut rest = length - 127;
        while rest >= 128 {
            block.push((rest % 128 + 128) as u8);
            rest /= 128;
        }
        block.push(rest as u8);
    }
    block.extend_from_slice(bytes);
}

/// The status at the beginning of a block of fields.
fn status(block: &[u8]) -> u16 {
    // Changes of the table's size may come first.
    let block = &block[block.iter().take_while(|byte| **byte & 0xe0 == 0x20).count()..];
    match block.first() {
        Some(0x88) => 200,
        Some(0x89) => 204,
        Some(0x8a) => 206,
        Some(0x8b) => 304,
        Some(0x8c) => 400,
        Some(0x8d) => 404,
        Some(0x8e) => 500,
        // A literal whose name is the eighth of the static table.
        Some(0x48 | 0x08 | 0x18) => {
            let length = usize::from(block[1] & 0x7f);
            let value = &block[2..2 + length];
            let text = if block[1] & 0x80 == 0 { value.to_vec() } else { digits(value) };
            String::from_utf8_lossy(&text).parse().unwrap_or(0)
        }
        _ => 0,
    }
}

/// Huffman-coded digits: 0 to 2 have five bits, the others six.
fn digits(bytes: &[u8]) -> Vec<u8> {
    let bits: Vec<u8> = bytes.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect();
    let (mut text, mut at) = (Vec::new(), 0);
    let read = |from: usize, count: usize| {
        bits.get(from..from + count).map(|bits| bits.iter().fold(0_u8, |code, bit| code << 1 | bit))
    };
    while let Some(short) = read(at, 5) {
        if short <= 2 {
            text.push(b'0' + short);
            at += 5;
        } else if let Some(long @ 0x19..=0x1f) = read(at, 6) {
            text.push(b'3' + long - 0x19);
            at += 6;
        } else {
            break;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_read_in_every_form() {
        assert_eq!(status(&[0x88]), 200);
        assert_eq!(status(&[0x20, 0x8c]), 400);
        assert_eq!(status(&[0x48, 3, b'5', b'0', b'3']), 503);
        // 503: 011011 00000 011001, padded with ones.
        assert_eq!(status(&[0x48, 0x83, 0b0110_1100, 0b0000_1100, 0b1111_1111]), 503);
        // 501: 011011 00000 00001.
        assert_eq!(status(&[0x08, 0x82, 0b0110_1100, 0b0000_0001]), 501);
    }
}
