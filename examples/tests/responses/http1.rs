//! Upstreams over HTTP/1.1: bytes that are no answer, or more than one.

use std::sync::Arc;

use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader};

use crate::{Asked, Broken, Security, Seen, leave_later_ones_alone};

/// What nobody asked for: whoever takes it for an answer has lost his place.
const POISON: &str = "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison";

struct Case {
    name: &'static str,
    method: &'static str,
    answer: String,
    seen: Seen,
    /// Whether the upstream closes after it.
    closes: bool,
}

fn cases() -> Vec<Case> {
    let case = |name, method, answer: &str, seen| Case {
        name,
        method,
        answer: format!("{answer}{POISON}"),
        seen,
        closes: false,
    };
    let interim = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n".repeat(1000);
    let mut all = vec![
        case("garbage", "GET", "HTTP/1.1 2OO OK\r\n\r\n", Seen::Refused),
        case("no status line", "GET", "\0\0\0\x07SSH-2.0\r\n\r\n", Seen::Refused),
        case("HTTP/3.0", "GET", "HTTP/3.0 200 OK\r\ncontent-length: 2\r\n\r\nok", Seen::Refused),
        case(
            "two lengths",
            "GET",
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nokk",
            Seen::Refused,
        ),
        case("a list of lengths", "GET", "HTTP/1.1 200 OK\r\ncontent-length: 2, 3\r\n\r\nokk", Seen::Refused),
        case("no number", "GET", "HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nok", Seen::Refused),
        case(
            "obsolete fold",
            "GET",
            "HTTP/1.1 200 OK\r\nx-a: 1\r\n 2\r\ncontent-length: 2\r\n\r\nok",
            Seen::Refused,
        ),
        case(
            "the same length twice",
            "GET",
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nok",
            Seen::Status(200, "ok"),
        ),
        case(
            "more than its length",
            "GET",
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            Seen::Status(200, "ok"),
        ),
        case(
            "length below chunks",
            "GET",
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            Seen::Status(200, "hello"),
        ),
        case(
            "length above chunks",
            "GET",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 50\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            Seen::Status(200, "hello"),
        ),
        case(
            "broken chunk",
            "GET",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhelloXX\r\n0\r\n\r\n",
            Seen::Cut,
        ),
        case(
            "negative chunk",
            "GET",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
            Seen::Cut,
        ),
        case(
            "1,000 interim answers",
            "GET",
            &format!("{interim}HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"),
            Seen::Status(200, "ok"),
        ),
        case(
            "204 with a body",
            "GET",
            "HTTP/1.1 204 No Content\r\ncontent-length: 4\r\n\r\nbody",
            Seen::Status(204, ""),
        ),
        case(
            "304 with a body",
            "GET",
            "HTTP/1.1 304 Not Modified\r\ncontent-length: 4\r\n\r\nbody",
            Seen::Status(304, ""),
        ),
        case(
            "304 with chunks",
            "GET",
            "HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
            Seen::Status(304, ""),
        ),
        case(
            "HEAD with a body",
            "HEAD",
            "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nbody",
            Seen::Status(200, ""),
        ),
        case(
            "unasked 101",
            "GET",
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n",
            Seen::Refused,
        ),
    ];
    all.push(Case {
        name: "less than its length",
        method: "GET",
        answer: "HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nok".to_owned(),
        seen: Seen::Cut,
        closes: true,
    });
    all.push(Case {
        name: "chunks without an end",
        method: "GET",
        answer: "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n".to_owned(),
        seen: Seen::Cut,
        closes: true,
    });
    all.push(Case {
        name: "nothing at all",
        method: "GET",
        answer: String::new(),
        seen: Seen::Status(
            503,
            "upstream connect error or disconnect/reset before headers. reset reason: connection termination",
        ),
        closes: true,
    });
    all
}

impl Broken for Vec<Case> {
    const PROTOCOL: &'static str = "HTTP";

    fn asked(&self, at: usize) -> Asked<'_> {
        let Case { name, method, seen, .. } = &self[at % self.len()];
        Asked { name, method, seen: std::slice::from_ref(seen) }
    }

    /// `/bad/N/…` is answered by case N, everything else by its path.
    async fn serve<IO: AsyncRead + AsyncWrite + Unpin + Send>(&self, io: IO) {
        let mut stream = BufReader::new(io);
        loop {
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                if stream.read_line(&mut head).await.unwrap_or(0) == 0 {
                    return;
                }
            }
            let path = head.split(' ').nth(1).unwrap_or_default();
            let bad =
                path.strip_prefix("/bad/").and_then(|rest| rest.split('/').next()?.parse::<usize>().ok());
            let (answer, closes) = match bad {
                Some(at) => (self[at % self.len()].answer.clone(), self[at % self.len()].closes),
                None => (format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{path}", path.len()), false),
            };
            let written = stream.write_all(answer.as_bytes()).await.is_ok() && stream.flush().await.is_ok();
            if !written || closes {
                return;
            }
        }
    }
}

#[tokio::test]
async fn a8_broken_answers_leave_later_ones_alone() {
    leave_later_ones_alone(Arc::new(cases()), Security::Plaintext).await;
}

#[tokio::test]
async fn a8_broken_answers_leave_later_ones_alone_over_mutual_tls() {
    leave_later_ones_alone(Arc::new(cases()), Security::Mutual).await;
}
