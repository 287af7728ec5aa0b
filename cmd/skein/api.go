package main

import (
	"log/slog"
	"time"

	"skein.io/skein/node/api"
	"skein.io/skein/node/api/access"
	"skein.io/skein/node/daemon"
)

// apiFlags are the settings of a node's API: the names are kube-apiserver's, where it has them.
type apiFlags struct {
	AuthenticationConfig string            `help:"AuthenticationConfiguration file: OpenID Connect issuers, anonymous access. Read again when it changes. All API files: the same on all nodes." type:"path" env:"SKEIN_AUTHENTICATION_CONFIG"`
	TokenWebhookConfig   string            `name:"authentication-token-webhook-config-file" help:"Kubeconfig of a webhook that is asked about bearer tokens." type:"path" env:"SKEIN_AUTHENTICATION_TOKEN_WEBHOOK_CONFIG_FILE"`
	TokenWebhookTTL      time.Duration     `name:"authentication-token-webhook-cache-ttl" help:"How long its answers are used again." env:"SKEIN_AUTHENTICATION_TOKEN_WEBHOOK_CACHE_TTL" default:"2m"`
	AuthorizationConfig  string            `help:"AuthorizationConfiguration file: webhooks beside Node and RBAC. Read again when it changes." type:"path" env:"SKEIN_AUTHORIZATION_CONFIG"`
	AdmissionConfig      string            `name:"admission-control-config-file" help:"AdmissionConfiguration file: settings of admission plugins, as of PodSecurity." type:"path" env:"SKEIN_ADMISSION_CONTROL_CONFIG_FILE"`
	EnableAdmission      []string          `name:"enable-admission-plugins" help:"Admission plugins beyond the default ones." env:"SKEIN_ENABLE_ADMISSION_PLUGINS"`
	DisableAdmission     []string          `name:"disable-admission-plugins" help:"Admission plugins that are not to run." env:"SKEIN_DISABLE_ADMISSION_PLUGINS"`
	AuditPolicyFile      string            `help:"Audit Policy file: which requests are recorded. Default: none." type:"path" env:"SKEIN_AUDIT_POLICY_FILE"`
	AuditLogPath         string            `help:"Where they are recorded; - for standard output." env:"SKEIN_AUDIT_LOG_PATH"`
	AuditLogMaxSize      int               `name:"audit-log-maxsize" help:"Size in MB at which that file is put aside." env:"SKEIN_AUDIT_LOG_MAXSIZE" default:"100"`
	AuditLogMaxBackup    int               `name:"audit-log-maxbackup" help:"How many of these are kept." env:"SKEIN_AUDIT_LOG_MAXBACKUP" default:"10"`
	AuditLogMaxAge       int               `name:"audit-log-maxage" help:"For how many days; 0 for any time." env:"SKEIN_AUDIT_LOG_MAXAGE"`
	AuditWebhookConfig   string            `name:"audit-webhook-config-file" help:"Kubeconfig of where audit events are sent." type:"path" env:"SKEIN_AUDIT_WEBHOOK_CONFIG_FILE"`
	SchedulerConfig      string            `help:"KubeSchedulerConfiguration file: profiles by which pods are placed while this node leads." type:"path" env:"SKEIN_SCHEDULER_CONFIG"`
	RuntimeConfig        map[string]string `help:"Versions of the API to serve beside the stable ones: GROUP/VERSION=true, api/beta=true, api/all=true." env:"SKEIN_RUNTIME_CONFIG" mapsep:","`
	MaxRequests          int               `name:"max-requests-inflight" help:"Reads that are worked on at once." env:"SKEIN_MAX_REQUESTS_INFLIGHT" default:"400"`
	MaxMutatingRequests  int               `name:"max-mutating-requests-inflight" help:"Writes that are worked on at once." env:"SKEIN_MAX_MUTATING_REQUESTS_INFLIGHT" default:"200"`
	MaxWatches           int               `help:"Watches that may be open on this node." env:"SKEIN_MAX_WATCHES" default:"10000"`
	MaxWatchesPerUser    int               `help:"How many of them one user may have." env:"SKEIN_MAX_WATCHES_PER_USER" default:"1000"`
	RequestLog           string            `help:"Level of the log's line about each request to the API (seen if --log-level lets it): debug, info, warn or error." enum:"debug,info,warn,error" env:"SKEIN_REQUEST_LOG" default:"debug"`
}

func (f *apiFlags) apply(c *daemon.Config) error {
	c.Access = access.Config{
		Authentication: f.AuthenticationConfig, TokenWebhook: f.TokenWebhookConfig, TokenWebhookTTL: f.TokenWebhookTTL,
		Authorization: f.AuthorizationConfig, Admission: f.AdmissionConfig, EnablePlugins: f.EnableAdmission, DisablePlugins: f.DisableAdmission,
		Audit: access.Audit{Policy: f.AuditPolicyFile, Log: f.AuditLogPath, MaxSize: f.AuditLogMaxSize, MaxBackups: f.AuditLogMaxBackup, MaxAge: f.AuditLogMaxAge, Webhook: f.AuditWebhookConfig},
	}
	c.SchedulerConfig = f.SchedulerConfig
	c.RuntimeConfig = f.RuntimeConfig
	c.Limits = api.Limits{Reads: f.MaxRequests, Writes: f.MaxMutatingRequests, Watches: f.MaxWatches, UserWatches: f.MaxWatchesPerUser}
	var level slog.Level
	if err := level.UnmarshalText([]byte(f.RequestLog)); err != nil {
		return err
	}
	c.RequestLog = &level
	return nil
}
