//! The line of a connection that is not HTTP, in the same format: what only requests have is `-`.

use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use mesh_core::{ConnInfo, ResponseFlags};

use super::entry::{Dash, escape_words, quoted};
use super::sink::AccessLogSink;

/// A connection that has ended.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionEntry<'a> {
    /// The downstream.
    pub conn: &'a ConnInfo,
    /// What the proxy did to it.
    pub flags: ResponseFlags,
    /// Why there was no connection to the upstream.
    pub transport_failure: Option<&'a str>,
    /// Bytes from the downstream.
    pub received_bytes: u64,
    /// Bytes to the downstream.
    pub sent_bytes: u64,
    /// From its beginning to its end, which is now.
    pub duration: Duration,
    /// The endpoint.
    pub upstream: Option<SocketAddr>,
    /// The cluster.
    pub cluster: Option<&'a str>,
    /// Our end of the connection to the endpoint.
    pub upstream_local: Option<SocketAddr>,
    /// The server name that the client asked for.
    pub sni: Option<&'a str>,
    /// The route.
    pub route: Option<&'a str>,
}

impl AccessLogSink {
    /// Writes the line of a connection. Never blocks.
    pub fn connection(&self, entry: &ConnectionEntry<'_>) {
        let mut line = String::with_capacity(320);
        // Writing to a String cannot fail.
        let _ = entry.write(&mut line, SystemTime::now());
        self.write(line);
    }
}

impl ConnectionEntry<'_> {
    fn write(&self, out: &mut String, now: SystemTime) -> fmt::Result {
        let started = now.checked_sub(self.duration).unwrap_or(now);
        let word = |out: &mut String, value: Option<&str>| match value.filter(|value| !value.is_empty()) {
            Some(value) => escape_words(out, value.as_bytes()),
            None => out.write_char('-'),
        };
        write!(out, "[{}] \"- - -\" 0 {} - - ", humantime::format_rfc3339_millis(started), self.flags)?;
        quoted(out, self.transport_failure.map(str::as_bytes))?;
        write!(out, " {} {} {} - ", self.received_bytes, self.sent_bytes, self.duration.as_millis())?;
        write!(out, "\"-\" \"-\" \"-\" \"-\" \"{}\" ", Dash(self.upstream))?;
        word(out, self.cluster)?;
        let local = self.conn.original_dst.unwrap_or(self.conn.local);
        write!(out, " {} {local} {} ", Dash(self.upstream_local), self.conn.peer)?;
        word(out, self.sni)?;
        out.push(' ');
        word(out, self.route)?;
        out.push('\n');
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::Direction;

    use super::*;

    #[test]
    fn te_06_a_connection_has_the_fields_of_a_request() {
        let original = Some("10.0.0.1:443".parse().unwrap());
        let conn = ConnInfo { original_dst: original, ..ConnInfo::unknown(Direction::Outbound) };
        let entry = ConnectionEntry {
            conn: &conn,
            flags: ResponseFlags::UPSTREAM_CONNECTION_FAILURE,
            transport_failure: Some("Connection refused"),
            received_bytes: 5,
            sent_bytes: 7,
            duration: Duration::from_millis(1500),
            upstream: Some("127.0.0.1:9".parse().unwrap()),
            cluster: Some("outbound|443||a.example.com"),
            upstream_local: None,
            sni: Some("a.example.com"),
            route: Some("v.default.tls[0]"),
        };
        let mut line = String::new();
        entry.write(&mut line, SystemTime::UNIX_EPOCH + Duration::from_secs(60)).unwrap();
        assert_eq!(
            line,
            "[1970-01-01T00:00:58.500Z] \"- - -\" 0 UF - - \"Connection refused\" 5 7 1500 - \"-\" \"-\" \"-\" \"-\" \
             \"127.0.0.1:9\" outbound|443||a.example.com - 10.0.0.1:443 0.0.0.0:0 a.example.com v.default.tls[0]\n"
        );
        let ended = ConnectionEntry {
            flags: ResponseFlags::NONE,
            transport_failure: None,
            upstream: None,
            cluster: None,
            sni: None,
            route: None,
            ..entry
        };
        let mut line = String::new();
        ended.write(&mut line, SystemTime::UNIX_EPOCH + Duration::from_secs(60)).unwrap();
        assert!(line.contains("\"- - -\" 0 - - - \"-\" 5 7 1500 - "), "{line}");
        assert!(line.ends_with(" \"-\" - - 10.0.0.1:443 0.0.0.0:0 - -\n"), "{line}");
    }
}
