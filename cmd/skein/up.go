package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"skein.io/skein/node/cri"
	"skein.io/skein/node/daemon"
)

// nodeFlags are the settings of a node; the configuration file has the same names.
type nodeFlags struct {
	Name                 string            `help:"Node name, unique in the cluster." env:"SKEIN_NAME" default:"${hostname}"`
	StateDir             string            `help:"Where the node keeps its state." type:"path" env:"SKEIN_STATE_DIR" default:"${state}"`
	Address              string            `help:"IPv4 address that other nodes reach this one at (default: the one towards the default route)." env:"SKEIN_ADDRESS"`
	Zone                 string            `help:"Failure zone of the node: voters and pods spread over zones." env:"SKEIN_ZONE"`
	Label                map[string]string `help:"Labels of the node (KEY=VALUE)." env:"SKEIN_LABELS" mapsep:","`
	Voter                string            `help:"Whether this node may hold a vote in the store: auto, never or prefer. Sets the label skein.io/voter, which can be changed later." enum:"auto,never,prefer" env:"SKEIN_VOTER" default:"auto"`
	ReplaceAfter         time.Duration     `name:"voter-replace-after" help:"How long a voter may be dead before a spare takes its place." env:"SKEIN_VOTER_REPLACE_AFTER" default:"30s"`
	Profile              string            `help:"Network profile of the failure detector: lan or edge, for slow links (first node only)." enum:"lan,edge" env:"SKEIN_PROFILE" default:"lan"`
	CRIEndpoint          string            `name:"cri-endpoint" help:"Socket of a CRI runtime to use instead of the embedded containerd (unix:///run/containerd/containerd.sock)." env:"SKEIN_CRI_ENDPOINT"`
	CNIDir               string            `name:"cni-dir" help:"Where the runtime of --cri-endpoint reads network configurations: the node's is put there (default: what the runtime says, or /etc/cni/net.d)." type:"path" env:"SKEIN_CNI_DIR"`
	CNIBinDir            string            `name:"cni-bin-dir" help:"Where the runtime of --cri-endpoint looks for network plugins: a link to skein-helper is put there (default: what the runtime says, or /opt/cni/bin)." type:"path" env:"SKEIN_CNI_BIN_DIR"`
	InsecureRegistry     []string          `help:"Registries (HOST[:PORT]) that speak plain http." env:"SKEIN_INSECURE_REGISTRY"`
	RegistryMirror       []string          `help:"Where to ask for a registry's images before itself (REGISTRY=URL)." env:"SKEIN_REGISTRY_MIRROR"`
	RegistryDir          string            `help:"Directory with containerd's own files about registries, HOST_PORT_/hosts.toml, instead of the two above (default: /etc/containerd/certs.d)." type:"path" env:"SKEIN_REGISTRY_DIR"`
	CgroupRoot           string            `help:"Cgroup, in every hierarchy, under which the node and its pods live." env:"SKEIN_CGROUP_ROOT" default:"/skein"`
	ServiceCgroup        string            `help:"Cgroup whose processes reach Services (default: the whole machine)." env:"SKEIN_SERVICE_CGROUP"`
	Uplink               string            `help:"Network interface towards the other nodes (default: the one that has --address)." env:"SKEIN_UPLINK"`
	PodCIDR              string            `name:"pod-cidr" help:"Pod addresses of the whole cluster (first node only)." env:"SKEIN_POD_CIDR" default:"10.244.0.0/16"`
	ServiceCIDR          string            `name:"service-cidr" help:"Service addresses of the cluster (first node only). With a comma and an IPv6 network Services may have addresses of both families; a cluster gets that when its nodes are started so. Pods have IPv4 addresses only, so IPv6 ones are given, but lead nowhere." env:"SKEIN_SERVICE_CIDR" default:"10.96.0.0/16"`
	ClusterDomain        string            `help:"DNS domain of the cluster (first node only)." env:"SKEIN_CLUSTER_DOMAIN" default:"cluster.local"`
	BackupDir            string            `help:"Directory for scheduled backups, which the cluster's leader makes (all nodes: the same)." type:"path" env:"SKEIN_BACKUP_DIR"`
	BackupSchedule       string            `help:"When: five cron fields in UTC, @hourly, @daily, @every 6h (default: @daily)." env:"SKEIN_BACKUP_SCHEDULE"`
	BackupKeep           int               `help:"How many scheduled backups to keep; negative for any number (default: 7)." env:"SKEIN_BACKUP_KEEP"`
	BackupKeepFor        time.Duration     `help:"How long to keep them; the newest stays in any case (default: for ever)." env:"SKEIN_BACKUP_KEEP_FOR"`
	BackupPassphraseFile string            `help:"File with the passphrase that seals the keys in them." type:"path" env:"SKEIN_BACKUP_PASSPHRASE_FILE"`
	EvictionGrace        time.Duration     `help:"How long pods stay on a dead node before others replace them." env:"SKEIN_EVICTION_GRACE" default:"10s"`
	EtcdPort             int               `help:"Port at which the first shard of the store is served as etcd, to administrators; the others take those behind it. -1: not at all." env:"SKEIN_ETCD_PORT" default:"7950"`
	StoreQuota           int64             `help:"What each shard of the store may have in use, in MiB; negative for no bound. The same on all nodes." env:"SKEIN_STORE_QUOTA" default:"2048"`
	Seal                 []string          `help:"Resources whose objects are sealed in the store, beside Secrets (RESOURCE or RESOURCE.GROUP; the same on all nodes)." env:"SKEIN_SEAL"`
	apiFlags
	CertTTL   time.Duration `name:"cert-ttl" hidden:"" help:"Life of the certificates of nodes that this node signs." env:"SKEIN_CERT_TTL"`
	KeySettle time.Duration `hidden:"" help:"How long a key rotation waits for earlier requests to end." env:"SKEIN_KEY_SETTLE"`
	LogLevel  string        `help:"debug, info, warn or error." enum:"debug,info,warn,error" env:"SKEIN_LOG_LEVEL" default:"info"`
}

func (f *nodeFlags) config() (daemon.Config, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(f.LogLevel)); err != nil {
		return daemon.Config{}, err
	}
	c := daemon.Config{
		Name: strings.ToLower(f.Name), StateDir: f.StateDir, Zone: f.Zone, Labels: f.Label, Voter: f.Voter, Profile: f.Profile,
		CRIEndpoint: f.CRIEndpoint, CNIDir: f.CNIDir, CNIBinDir: f.CNIBinDir, CgroupRoot: f.CgroupRoot, ServiceCgroup: f.ServiceCgroup, Uplink: f.Uplink, ClusterDomain: f.ClusterDomain,
		EvictionGrace: f.EvictionGrace, EtcdPort: f.EtcdPort, StoreQuota: f.StoreQuota, KeySettle: f.KeySettle, ReplaceAfter: f.ReplaceAfter, Out: os.Stdout,
		CertTTL: f.CertTTL,
		Logger:  slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})),
	}
	for _, r := range f.Seal {
		c.Sealed = append(c.Sealed, schema.ParseGroupResource(r))
	}
	c.Registries = cri.Registries{Insecure: f.InsecureRegistry, Dir: f.RegistryDir}
	for _, m := range f.RegistryMirror {
		host, url, ok := strings.Cut(m, "=")
		if !ok {
			return c, fmt.Errorf("--registry-mirror %q: want REGISTRY=URL", m)
		}
		if c.Registries.Mirrors == nil {
			c.Registries.Mirrors = map[string][]string{}
		}
		c.Registries.Mirrors[host] = append(c.Registries.Mirrors[host], url)
	}
	if err := f.apiFlags.apply(&c); err != nil {
		return c, err
	}
	c.Backup = daemon.BackupSchedule{Dir: f.BackupDir, Schedule: f.BackupSchedule, Keep: f.BackupKeep, KeepFor: f.BackupKeepFor, PassphraseFile: f.BackupPassphraseFile}
	var err error
	if f.Address == "" {
		if c.Address, err = defaultAddress(); err != nil {
			return c, err
		}
	} else if c.Address, err = netip.ParseAddr(f.Address); err != nil {
		return c, fmt.Errorf("--address: %w", err)
	}
	if c.PodCIDR, err = netip.ParsePrefix(f.PodCIDR); err != nil {
		return c, fmt.Errorf("--pod-cidr: %w", err)
	}
	first, second, both := strings.Cut(f.ServiceCIDR, ",")
	if c.ServiceCIDR, err = netip.ParsePrefix(first); err != nil {
		return c, fmt.Errorf("--service-cidr: %w", err)
	}
	if both {
		if c.ServiceCIDR6, err = netip.ParsePrefix(second); err != nil {
			return c, fmt.Errorf("--service-cidr: %w", err)
		}
	}
	return c, nil
}

// quiet is for commands that tell what they do: of the log they show what goes wrong.
func (f *nodeFlags) quiet(c *daemon.Config) {
	if f.LogLevel == "info" {
		c.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	}
}

type upCmd struct {
	nodeFlags
}

func (u *upCmd) Run(ctx context.Context) error {
	c, err := u.config()
	if err != nil {
		return err
	}
	return daemon.Run(ctx, c, daemon.Intent{})
}

type joinCmd struct {
	nodeFlags
	Addresses []string `arg:"" name:"address" help:"Live members to try, in turn (HOST or HOST:PORT)."`
	Token     string   `help:"Join token ('skein token create' on any node makes one)." env:"SKEIN_TOKEN" required:""`
}

func (j *joinCmd) Run(ctx context.Context) error {
	c, err := j.config()
	if err != nil {
		return err
	}
	return daemon.Run(ctx, c, daemon.Intent{Join: j.Addresses, Token: j.Token})
}
