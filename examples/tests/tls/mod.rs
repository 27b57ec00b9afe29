//! TLS upstreams with certificates of their own, and clients that trust one of them only: who passes TLS through cannot
//! be told from nobody, and who terminates it is found out.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// Says its name to every client that completes a handshake, and then gives back what it gets.
pub(crate) struct TlsUpstream {
    pub(crate) addr: SocketAddr,
    certificate: CertificateDer<'static>,
}

impl TlsUpstream {
    /// An upstream with a certificate for these names. The first is what it says.
    pub(crate) async fn start(names: &[&str]) -> Self {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let greeting = names[0].clone();
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        let certificate = made.cert.der().clone();
        let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, greeting) = (acceptor.clone(), greeting.clone());
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else { return };
                    if stream.write_all(format!("{greeting}\n").as_bytes()).await.is_ok() {
                        let (mut read, mut write) = tokio::io::split(stream);
                        let _ = tokio::io::copy(&mut read, &mut write).await;
                        let _ = write.shutdown().await;
                    }
                });
            }
        });
        Self { addr, certificate }
    }

    /// A handshake through `peer` that asks for `name` and trusts this upstream alone. `fragment` bounds the records.
    pub(crate) async fn reach(
        &self,
        peer: SocketAddr,
        name: &str,
        fragment: Option<usize>,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.max_fragment_size = fragment;
        let stream = TcpStream::connect(peer).await?;
        TlsConnector::from(Arc::new(config))
            .connect(ServerName::try_from(name.to_owned()).unwrap(), stream)
            .await
    }

    /// What the upstream says, and what comes back of `bytes`, through `peer`.
    pub(crate) async fn exchange(
        &self,
        peer: SocketAddr,
        name: &str,
        fragment: Option<usize>,
        bytes: &[u8],
    ) -> std::io::Result<(String, Vec<u8>)> {
        let mut stream = self.reach(peer, name, fragment).await?;
        stream.write_all(bytes).await?;
        stream.shutdown().await?;
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await?;
        let end = all.iter().position(|byte| *byte == b'\n').unwrap_or(0);
        Ok((String::from_utf8_lossy(&all[..end]).into_owned(), all.split_off((end + 1).min(all.len()))))
    }
}
