//! Upstreams over HTTP/2: frames that are no answer, more than one, or nobody's.
//!
//! Fields are written as literals that are never indexed, and of those of a request nothing is read: it says what it asks
//! for in its body.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::{Asked, Broken, Security, Seen, leave_later_ones_alone};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;

/// Of SETTINGS and PING.
const ACK: u8 = 1;
/// Of HEADERS and DATA.
const END: u8 = 1;
const END_HEADERS: u8 = 4;

const PREFACE: usize = 24;

struct Case {
    name: &'static str,
    method: &'static str,
    /// The frames that answer a stream; none is the end of the connection.
    answer: fn(u32) -> Vec<u8>,
    seen: &'static [Seen],
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let stream = stream.to_be_bytes();
    [&[length[1], length[2], length[3], kind, flags][..], &stream, payload].concat()
}

fn head(stream: u32, fields: &[(&str, &str)], end: u8) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | end, stream, &block(fields))
}

fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let literal = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    fields.iter().flat_map(|(name, value)| [vec![0], literal(name), literal(value)].concat()).collect()
}

fn data(stream: u32, text: &str, end: u8) -> Vec<u8> {
    frame(DATA, end, stream, text.as_bytes())
}

/// A head, and a body that ends.
fn answer(stream: u32, fields: &[(&str, &str)], body: &str) -> Vec<u8> {
    [head(stream, fields, 0), data(stream, body, END)].concat()
}

/// What nobody asked for: whoever takes it for an answer has lost his place.
fn poison(stream: u32) -> Vec<u8> {
    answer(stream, &[(":status", "200"), ("content-length", "6")], "poison")
}

const OK: Seen = Seen::Status(200, "ok");
const TERMINATED: Seen = Seen::Status(
    503,
    "upstream connect error or disconnect/reset before headers. reset reason: connection termination",
);

fn cases() -> Vec<Case> {
    let case = |name, answer, seen| Case { name, method: "POST", answer, seen };
    let mut all = vec![
        case("garbage status", |id| answer(id, &[(":status", "2OO")], "ok"), &[Seen::Refused]),
        case(
            "two statuses",
            |id| answer(id, &[(":status", "200"), (":status", "500")], "ok"),
            &[Seen::Refused],
        ),
        case(
            "status after a field",
            |id| answer(id, &[("x-a", "1"), (":status", "200")], "ok"),
            &[Seen::Refused],
        ),
        case("no status", |id| answer(id, &[("content-length", "2")], "ok"), &[Seen::Refused]),
        // What has no place in an answer is left out of it.
        case("a request's field", |id| answer(id, &[(":status", "200"), (":path", "/")], "ok"), &[OK]),
        case(
            "unknown pseudo-header",
            |id| answer(id, &[(":status", "200"), (":a", "b")], "ok"),
            &[Seen::Refused],
        ),
        case("capitals", |id| answer(id, &[(":status", "200"), ("X-A", "1")], "ok"), &[Seen::Refused]),
        case(
            "connection",
            |id| answer(id, &[(":status", "200"), ("connection", "close")], "ok"),
            &[Seen::Refused],
        ),
        case(
            "transfer-encoding",
            |id| answer(id, &[(":status", "200"), ("transfer-encoding", "chunked")], "ok"),
            &[Seen::Refused],
        ),
        case(
            "a line break",
            |id| answer(id, &[(":status", "200"), ("x-a", "1\r\nx-b: 2")], "ok"),
            &[Seen::Refused],
        ),
        case(
            "two lengths",
            |id| answer(id, &[(":status", "200"), ("content-length", "2"), ("content-length", "3")], "ok"),
            &[Seen::Refused],
        ),
        case(
            "no number",
            |id| answer(id, &[(":status", "200"), ("content-length", "+2")], "ok"),
            &[Seen::Refused],
        ),
        case(
            "more than its length",
            |id| answer(id, &[(":status", "200"), ("content-length", "2")], "okk"),
            &[Seen::Cut, Seen::Refused],
        ),
        case(
            "less than its length",
            |id| answer(id, &[(":status", "200"), ("content-length", "50")], "ok"),
            &[Seen::Cut, Seen::Refused],
        ),
        case(
            "no body where there is a length",
            |id| head(id, &[(":status", "200"), ("content-length", "50")], END),
            &[Seen::Cut, Seen::Refused],
        ),
        case(
            "1,000 interim answers",
            |id| {
                let interim = head(id, &[(":status", "103"), ("link", "</a>")], 0).repeat(1000);
                [interim, answer(id, &[(":status", "200")], "ok")].concat()
            },
            &[OK, Seen::Refused],
        ),
        case("101", |id| answer(id, &[(":status", "101")], "ok"), &[Seen::Refused]),
        case("204 with a body", |id| answer(id, &[(":status", "204")], "body"), &[Seen::Status(204, "")]),
        case("304 with a body", |id| answer(id, &[(":status", "304")], "body"), &[Seen::Status(304, "")]),
        case(
            "body without a head",
            |id| [data(id, "ok", 0), answer(id, &[(":status", "200")], "ok")].concat(),
            &[Seen::Refused, TERMINATED],
        ),
        case(
            "status in trailers",
            |id| {
                let (first, last) =
                    (head(id, &[(":status", "200")], 0), head(id, &[(":status", "200")], END));
                [first, data(id, "ok", 0), last].concat()
            },
            &[OK, Seen::Cut, Seen::Refused],
        ),
        case(
            "reset in mid-body",
            |id| {
                let begun = [head(id, &[(":status", "200"), ("content-length", "50")], 0), data(id, "ok", 0)];
                [begun.concat(), frame(RST_STREAM, 0, id, &[0, 0, 0, 0])].concat()
            },
            &[Seen::Cut, Seen::Refused],
        ),
        case(
            "another answer after its end",
            |id| [answer(id, &[(":status", "200"), ("content-length", "2")], "ok"), poison(id)].concat(),
            &[OK],
        ),
        case(
            "an answer to what is not asked yet",
            |id| [answer(id, &[(":status", "200"), ("content-length", "2")], "ok"), poison(id + 2)].concat(),
            &[OK, Seen::Refused, TERMINATED],
        ),
        case(
            "a promise",
            |id| {
                let promised =
                    [&(id + 1).to_be_bytes()[..], &block(&[(":method", "GET"), (":path", "/")])].concat();
                let promise = frame(PUSH_PROMISE, END_HEADERS, id, &promised);
                [promise, answer(id, &[(":status", "200")], "ok"), poison(id + 1)].concat()
            },
            &[Seen::Refused, TERMINATED],
        ),
        case(
            "no compression",
            |id| frame(HEADERS, END_HEADERS | END, id, &[0xff; 12]),
            &[Seen::Refused, TERMINATED],
        ),
        case(
            "a head that does not end",
            |id| [frame(HEADERS, 0, id, &block(&[(":status", "200")])), data(id, "ok", END)].concat(),
            &[Seen::Refused, TERMINATED],
        ),
        case(
            "a frame longer than is allowed",
            |id| [head(id, &[(":status", "200")], 0), frame(DATA, END, id, &[b'a'; 16_385])].concat(),
            &[Seen::Cut, Seen::Refused, TERMINATED],
        ),
        case("nothing at all", |_| Vec::new(), &[TERMINATED]),
    ];
    all.push(Case {
        name: "HEAD with a body",
        method: "HEAD",
        answer: |id| answer(id, &[(":status", "200"), ("content-length", "4")], "body"),
        seen: &[Seen::Status(200, "")],
    });
    all
}

impl Broken for Vec<Case> {
    const PROTOCOL: &'static str = "HTTP2";

    fn asked(&self, at: usize) -> Asked<'_> {
        let Case { name, method, seen, .. } = &self[at % self.len()];
        Asked { name, method, seen }
    }

    async fn serve<IO: AsyncRead + AsyncWrite + Unpin + Send>(&self, mut io: IO) {
        let mut preface = [0; PREFACE];
        if io.read_exact(&mut preface).await.is_err()
            || write(&mut io, &frame(SETTINGS, 0, 0, &[])).await.is_err()
        {
            return;
        }
        let mut asked = Vec::new();
        loop {
            let mut head = [0; 9];
            if io.read_exact(&mut head).await.is_err() {
                return;
            }
            let [l0, l1, l2, kind, flags, id @ ..] = head;
            let mut payload = vec![0; u32::from_be_bytes([0, l0, l1, l2]) as usize];
            if io.read_exact(&mut payload).await.is_err() {
                return;
            }
            let id = u32::from_be_bytes(id) & (u32::MAX >> 1);
            let said = match kind {
                SETTINGS if flags & ACK == 0 => frame(SETTINGS, ACK, 0, &[]),
                PING if flags & ACK == 0 => frame(PING, ACK, 0, &payload),
                HEADERS => {
                    asked.clear();
                    continue;
                }
                DATA => {
                    asked.extend_from_slice(&payload);
                    let mut said = Vec::new();
                    if !payload.is_empty() {
                        let taken = u32::try_from(payload.len()).unwrap().to_be_bytes();
                        said = frame(WINDOW_UPDATE, 0, 0, &taken);
                    }
                    if flags & END != 0 {
                        let path = String::from_utf8(asked.clone()).unwrap();
                        let bad = path
                            .strip_prefix("/bad/")
                            .map(|rest| rest.trim_end_matches('/').parse::<usize>());
                        let answer = match bad {
                            Some(at) => (self[at.unwrap() % self.len()].answer)(id),
                            None => answer(id, &[(":status", "200")], &path),
                        };
                        if answer.is_empty() {
                            return;
                        }
                        said.extend(answer);
                    }
                    said
                }
                _ => continue,
            };
            if write(&mut io, &said).await.is_err() {
                return;
            }
        }
    }
}

async fn write(io: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> std::io::Result<()> {
    io.write_all(bytes).await?;
    io.flush().await
}

#[tokio::test]
async fn a8_broken_answers_over_http2_leave_later_ones_alone() {
    leave_later_ones_alone(Arc::new(cases()), Security::Plaintext).await;
}

#[tokio::test]
async fn a8_broken_answers_over_http2_leave_later_ones_alone_over_mutual_tls() {
    leave_later_ones_alone(Arc::new(cases()), Security::Mutual).await;
}
