//! The names: Istio's vocabulary of attributes, each with its type.
//!
//! These are the 63 attributes that proxies tell and the 26 that platforms add in Istio 1.1, of which later versions use
//! a part. Expressions are typed when they are loaded, so a name that is not here is an error of the configuration.

use std::fmt;
use std::str::FromStr;

/// What kind of value an attribute has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AttributeType {
    /// Yes or no.
    Bool,
    /// A whole number, signed, of 64 bits.
    Int,
    /// Text.
    String,
    /// An IP address.
    Ip,
    /// A point in time.
    Timestamp,
    /// A length of time.
    Duration,
    /// Text by key.
    StringMap,
}

/// No attribute has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an attribute")]
pub struct UnknownAttribute(pub String);

macro_rules! vocabulary {
    ($($variant:ident, $name:literal, $kind:ident;)*) => {
        /// An attribute, by its name in the vocabulary.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Attribute {
            $(
                #[doc = concat!("`", $name, "`")]
                $variant,
            )*
        }

        impl Attribute {
            /// Every attribute: those that proxies tell, then those of platforms.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Its name, as expressions write it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// What kind of value it has.
            #[must_use]
            pub const fn kind(self) -> AttributeType {
                match self {
                    $(Self::$variant => AttributeType::$kind,)*
                }
            }
        }
    };
}

vocabulary! {
    OriginIp, "origin.ip", Ip;
    OriginUid, "origin.uid", String;
    OriginUser, "origin.user", String;
    RequestHeaders, "request.headers", StringMap;
    RequestId, "request.id", String;
    RequestHost, "request.host", String;
    RequestMethod, "request.method", String;
    RequestPath, "request.path", String;
    RequestUrlPath, "request.url_path", String;
    RequestQueryParams, "request.query_params", StringMap;
    RequestReason, "request.reason", String;
    RequestReferer, "request.referer", String;
    RequestScheme, "request.scheme", String;
    RequestTotalSize, "request.total_size", Int;
    RequestSize, "request.size", Int;
    RequestTime, "request.time", Timestamp;
    RequestUseragent, "request.useragent", String;
    ResponseCode, "response.code", Int;
    ResponseDuration, "response.duration", Duration;
    ResponseHeaders, "response.headers", StringMap;
    ResponseTotalSize, "response.total_size", Int;
    ResponseSize, "response.size", Int;
    ResponseTime, "response.time", Timestamp;
    ResponseGrpcStatus, "response.grpc_status", String;
    ResponseGrpcMessage, "response.grpc_message", String;
    SourceUid, "source.uid", String;
    SourceUser, "source.user", String;
    SourcePrincipal, "source.principal", String;
    DestinationUid, "destination.uid", String;
    DestinationPort, "destination.port", Int;
    DestinationPrincipal, "destination.principal", String;
    ConnectionEvent, "connection.event", String;
    ConnectionId, "connection.id", String;
    ConnectionReceivedBytes, "connection.received.bytes", Int;
    ConnectionReceivedBytesTotal, "connection.received.bytes_total", Int;
    ConnectionSentBytes, "connection.sent.bytes", Int;
    ConnectionSentBytesTotal, "connection.sent.bytes_total", Int;
    ConnectionDuration, "connection.duration", Duration;
    ConnectionMtls, "connection.mtls", Bool;
    ConnectionRequestedServerName, "connection.requested_server_name", String;
    ContextProtocol, "context.protocol", String;
    ContextProxyErrorCode, "context.proxy_error_code", String;
    ContextTimestamp, "context.timestamp", Timestamp;
    ContextTime, "context.time", Timestamp;
    ContextReporterLocal, "context.reporter.local", Bool;
    ContextReporterKind, "context.reporter.kind", String;
    ContextReporterUid, "context.reporter.uid", String;
    ApiService, "api.service", String;
    ApiVersion, "api.version", String;
    ApiOperation, "api.operation", String;
    ApiProtocol, "api.protocol", String;
    RequestAuthPrincipal, "request.auth.principal", String;
    RequestAuthAudiences, "request.auth.audiences", String;
    RequestAuthPresenter, "request.auth.presenter", String;
    RequestAuthClaims, "request.auth.claims", StringMap;
    RequestAuthRawClaims, "request.auth.raw_claims", String;
    RequestApiKey, "request.api_key", String;
    RbacPermissiveResponseCode, "rbac.permissive.response_code", String;
    RbacPermissiveEffectivePolicyId, "rbac.permissive.effective_policy_id", String;
    CheckErrorCode, "check.error_code", Int;
    CheckErrorMessage, "check.error_message", String;
    CheckCacheHit, "check.cache_hit", Bool;
    QuotaCacheHit, "quota.cache_hit", Bool;
    SourceIp, "source.ip", Ip;
    SourceLabels, "source.labels", StringMap;
    SourceMetadata, "source.metadata", StringMap;
    SourceName, "source.name", String;
    SourceNamespace, "source.namespace", String;
    SourceOwner, "source.owner", String;
    SourceServiceAccount, "source.serviceAccount", String;
    SourceServices, "source.services", String;
    SourceWorkloadUid, "source.workload.uid", String;
    SourceWorkloadName, "source.workload.name", String;
    SourceWorkloadNamespace, "source.workload.namespace", String;
    DestinationIp, "destination.ip", Ip;
    DestinationLabels, "destination.labels", StringMap;
    DestinationMetadata, "destination.metadata", StringMap;
    DestinationOwner, "destination.owner", String;
    DestinationName, "destination.name", String;
    DestinationContainerName, "destination.container.name", String;
    DestinationNamespace, "destination.namespace", String;
    DestinationServiceUid, "destination.service.uid", String;
    DestinationServiceName, "destination.service.name", String;
    DestinationServiceNamespace, "destination.service.namespace", String;
    DestinationServiceHost, "destination.service.host", String;
    DestinationServiceAccount, "destination.serviceAccount", String;
    DestinationWorkloadUid, "destination.workload.uid", String;
    DestinationWorkloadName, "destination.workload.name", String;
    DestinationWorkloadNamespace, "destination.workload.namespace", String;
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// By its name. For loading configuration; it compares with one name after the other.
impl FromStr for Attribute {
    type Err = UnknownAttribute;

    fn from_str(name: &str) -> Result<Self, UnknownAttribute> {
        let found = Self::ALL.iter().find(|attribute| attribute.name() == name);
        found.copied().ok_or_else(|| UnknownAttribute(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn x_11_the_vocabulary_is_whole() {
        let names: BTreeSet<_> = Attribute::ALL.iter().map(|attribute| attribute.name()).collect();
        assert_eq!((Attribute::ALL.len(), names.len()), (63 + 26, 63 + 26), "no name stands for two");
        for attribute in Attribute::ALL {
            assert_eq!(attribute.name().parse(), Ok(*attribute));
        }
        let kind = |name: &str| name.parse::<Attribute>().unwrap().kind();
        assert_eq!(kind("request.headers"), AttributeType::StringMap);
        assert_eq!(kind("destination.port"), AttributeType::Int);
        assert_eq!(kind("source.ip"), AttributeType::Ip);
        assert_eq!(kind("connection.mtls"), AttributeType::Bool);
        assert_eq!(kind("response.duration"), AttributeType::Duration);
        assert_eq!(kind("request.time"), AttributeType::Timestamp);
        assert_eq!(
            "request.Headers".parse::<Attribute>(),
            Err(UnknownAttribute("request.Headers".to_owned()))
        );
    }
}
