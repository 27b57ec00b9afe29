//! Whether a text is an expression of the Common Expression Language, by its grammar alone.
//!
//! Istio's validator parses the filter of an access log and goes no further, since attributes are known to the
//! proxy only. This is that parser: recursive descent over the published grammar, which keeps no tree. Types are
//! checked where the expression is compiled.

use super::check::Checked;

/// How deep an expression may nest; more is refused before it can exhaust the stack.
const MAX_DEPTH: usize = 64;

/// Words that cannot name a variable.
const RESERVED: [&str; 16] = [
    "as",
    "break",
    "const",
    "continue",
    "else",
    "for",
    "function",
    "if",
    "import",
    "let",
    "loop",
    "package",
    "namespace",
    "return",
    "var",
    "void",
];

/// A well-formed expression.
///
/// # Errors
/// Where it is not, by byte offset.
pub(crate) fn expression(text: &str) -> Checked {
    let tokens = tokens(text)?;
    let mut parser = Parser { tokens: &tokens, next: 0, depth: 0 };
    parser.expression()?;
    match parser.peek() {
        Token::End => Ok(()),
        _ => Err(parser.unexpected("the end")),
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Token<'a> {
    Ident(&'a str),
    Literal,
    Mark(&'a str),
    End,
}

/// What the macros must know of an operand.
#[derive(Clone, Copy, PartialEq)]
enum Shape {
    Ident,
    Path,
    Other,
}

struct Parser<'a> {
    tokens: &'a [(usize, Token<'a>)],
    next: usize,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Token<'a> {
        self.tokens.get(self.next).map_or(Token::End, |(_, token)| *token)
    }

    fn take(&mut self, mark: &str) -> bool {
        let taken = self.peek() == Token::Mark(mark);
        self.next += usize::from(taken);
        taken
    }

    fn take_any(&mut self, marks: &[&str]) -> bool {
        marks.iter().any(|mark| self.take(mark))
    }

    fn expect(&mut self, mark: &str) -> Checked {
        if self.take(mark) { Ok(()) } else { Err(self.unexpected(&format!("`{mark}`"))) }
    }

    fn unexpected(&self, wanted: &str) -> String {
        let at = self.tokens.get(self.next).map_or(0, |(at, _)| *at);
        match self.peek() {
            Token::End => format!("must be a valid CEL expression: it ends where {wanted} is expected"),
            _ => format!("must be a valid CEL expression: {wanted} is expected at byte {at}"),
        }
    }

    fn expression(&mut self) -> Result<Shape, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err("must be a valid CEL expression: it nests too deep".to_owned());
        }
        let mut shape = self.binary(0)?;
        if self.take("?") {
            self.binary(0)?;
            self.expect(":")?;
            self.expression()?;
            shape = Shape::Other;
        }
        self.depth -= 1;
        Ok(shape)
    }

    /// The binary operators by rising precedence; all of them associate, so that a loop will do.
    fn binary(&mut self, level: usize) -> Result<Shape, String> {
        const LEVELS: [&[&str]; 5] =
            [&["||"], &["&&"], &["<=", "<", ">=", ">", "==", "!=", "in"], &["+", "-"], &["*", "/", "%"]];
        let Some(marks) = LEVELS.get(level) else { return self.unary() };
        let mut shape = self.binary(level + 1)?;
        while self.take_any(marks) {
            self.binary(level + 1)?;
            shape = Shape::Other;
        }
        Ok(shape)
    }

    fn unary(&mut self) -> Result<Shape, String> {
        for mark in ["!", "-"] {
            if self.take(mark) {
                while self.take(mark) {}
                self.member()?;
                return Ok(Shape::Other);
            }
        }
        self.member()
    }

    fn member(&mut self) -> Result<Shape, String> {
        let mut shape = self.primary()?;
        loop {
            if self.take(".") {
                let Token::Ident(name) = self.peek() else { return Err(self.unexpected("a name")) };
                self.next += 1;
                shape = Shape::Path;
                if self.take("(") {
                    self.arguments(name)?;
                    shape = Shape::Other;
                } else if self.take("{") {
                    self.entries()?;
                    shape = Shape::Other;
                }
            } else if self.take("[") {
                self.expression()?;
                self.expect("]")?;
                shape = Shape::Other;
            } else {
                return Ok(shape);
            }
        }
    }

    fn primary(&mut self) -> Result<Shape, String> {
        if self.take("(") {
            let shape = self.expression()?;
            self.expect(")")?;
            return Ok(shape);
        }
        if self.take("[") {
            return self.list("]").map(|_| Shape::Other);
        }
        if self.take("{") {
            return self.entries().map(|()| Shape::Other);
        }
        let rooted = self.take(".");
        match self.peek() {
            Token::Literal if !rooted => {
                self.next += 1;
                Ok(Shape::Other)
            }
            Token::Ident(name) if !RESERVED.contains(&name) && name != "while" => {
                self.next += 1;
                if self.take("(") {
                    self.arguments(name)?;
                    return Ok(Shape::Other);
                }
                if self.take("{") {
                    return self.entries().map(|()| Shape::Other);
                }
                Ok(Shape::Ident)
            }
            _ => Err(self.unexpected("an operand")),
        }
    }

    fn arguments(&mut self, function: &str) -> Checked {
        let shapes = self.list(")")?;
        let fine = match (function, shapes.first()) {
            ("has", Some(first)) => *first == Shape::Path,
            ("all" | "exists" | "exists_one" | "map" | "filter", Some(first)) if shapes.len() > 1 => {
                *first == Shape::Ident
            }
            _ => true,
        };
        if fine {
            Ok(())
        } else {
            Err(format!("must be a valid CEL expression: invalid argument to {function}()"))
        }
    }

    /// Expressions up to `close`, with a comma between them; a list may end in one, arguments may not.
    fn list(&mut self, close: &str) -> Result<Vec<Shape>, String> {
        let mut shapes = Vec::new();
        if self.take(close) {
            return Ok(shapes);
        }
        loop {
            shapes.push(self.expression()?);
            if self.take(close) {
                return Ok(shapes);
            }
            self.expect(",")?;
            if close == "]" && self.take(close) {
                return Ok(shapes);
            }
        }
    }

    fn entries(&mut self) -> Checked {
        while !self.take("}") {
            self.expression()?;
            self.expect(":")?;
            self.expression()?;
            if !self.take(",") {
                return self.expect("}");
            }
        }
        Ok(())
    }
}

fn tokens(text: &str) -> Result<Vec<(usize, Token<'_>)>, String> {
    const MARKS: [&str; 25] = [
        "||", "&&", "<=", ">=", "==", "!=", "<", ">", "+", "-", "*", "/", "%", "!", "?", ":", ".", ",", "(",
        ")", "[", "]", "{", "}", "in",
    ];
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
        let blank = rest.len() - rest.trim_start().len();
        if blank > 0 {
            at += blank;
            continue;
        }
        if rest.starts_with("//") {
            at += rest.find('\n').unwrap_or(rest.len());
            continue;
        }
        let (token, len) = if let Some(len) = string(rest)? {
            (Token::Literal, len)
        } else if let Some(len) = number(rest) {
            (Token::Literal, len)
        } else if let Some(word) = word(rest) {
            let token = match word {
                "true" | "false" | "null" => Token::Literal,
                "in" => Token::Mark("in"),
                _ => Token::Ident(word),
            };
            (token, word.len())
        } else if let Some(mark) = MARKS.into_iter().find(|mark| rest.starts_with(mark)) {
            (Token::Mark(mark), mark.len())
        } else {
            return Err(format!("must be a valid CEL expression: unknown character at byte {at}"));
        };
        tokens.push((at, token));
        at += len;
    }
    tokens.push((at, Token::End));
    Ok(tokens)
}

fn word(rest: &str) -> Option<&str> {
    let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
    rest.get(..end).filter(|word| word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_'))
}

/// The length of the number that `rest` begins with: decimal, `0x`, with `u`, or with a fraction or an exponent.
fn number(rest: &str) -> Option<usize> {
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let unsigned = |at: usize| usize::from(rest.get(at..).is_some_and(|tail| tail.starts_with(['u', 'U'])));
    if let Some(hex) = rest.strip_prefix("0x") {
        let len = 2 + hex.bytes().take_while(u8::is_ascii_hexdigit).count();
        return Some(len + unsigned(len)).filter(|_| len > 2);
    }
    let mut len = digits(rest);
    let fraction = rest.get(len..)?.strip_prefix('.').map_or(0, digits);
    if len == 0 && fraction == 0 {
        return None;
    }
    if fraction > 0 {
        len += 1 + fraction;
    }
    let exponent = rest.get(len..)?.strip_prefix(['e', 'E']).map_or(0, |tail| {
        let sign = usize::from(tail.starts_with(['+', '-']));
        match tail.get(sign..).map_or(0, digits) {
            0 => 0,
            digits => 1 + sign + digits,
        }
    });
    len += exponent;
    Some(if fraction + exponent == 0 { len + unsigned(len) } else { len })
}

/// The length of the string or bytes literal that `rest` begins with, its prefix and quotes included.
fn string(rest: &str) -> Result<Option<usize>, String> {
    let prefix = rest.bytes().take(2).take_while(|byte| b"rRbB".contains(byte)).count();
    let raw = rest[..prefix].contains(['r', 'R']);
    let Some(quoted) = rest.get(prefix..) else { return Ok(None) };
    let Some(quote) = ["\"\"\"", "'''", "\"", "'"].into_iter().find(|quote| quoted.starts_with(quote)) else {
        return Ok(None);
    };
    let mut at = quote.len();
    while let Some(tail) = quoted.get(at..).filter(|tail| !tail.is_empty()) {
        if tail.starts_with(quote) {
            return Ok(Some(prefix + at + quote.len()));
        }
        if quote.len() == 1 && tail.starts_with(['\n', '\r']) {
            break;
        }
        let escape = !raw && tail.starts_with('\\');
        at += usize::from(escape);
        at += quoted.get(at..).and_then(|tail| tail.chars().next()).map_or(1, char::len_utf8);
    }
    Err("must be a valid CEL expression: a string is not closed".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn te_05_filters_are_parsed() {
        for text in [
            "response.code >= 400",
            "connection.mtls && request.url_path.contains('v1beta3')",
            "!has(request.auth) || request.headers['x-a'] in [\"a\", 'b',]",
            "a ? b : c.d(1, 2u, 0xff, 1.5e-3, .5)[0]",
            "[1, 2].exists(x, x > 1) && {'a': 1}.size() == 1",
            "--1 + -x % 2 == r'\\' // tail",
            "google.protobuf.Duration{seconds: 1}",
        ] {
            assert_eq!(expression(text), Ok(()), "{text}");
        }
        for text in [
            "",
            "a ||",
            "a b",
            "response.code >= ",
            "'open",
            "f(a,)",
            "a..b",
            "(a",
            "if",
            "has(a)",
            "1x",
            "@",
            "a = b",
            "[x].all(1, true)",
            &"(".repeat(10_000),
        ] {
            assert!(expression(text).is_err(), "{text}");
        }
    }
}
