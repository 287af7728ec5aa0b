package agent

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Bounds of a resolver configuration, as kubelet's.
const (
	maxNameservers = 3
	maxSearches    = 32
	maxSearchChars = 2048
	maxHostname    = 63
	maxFQDN        = 64
)

// resolver is a parsed resolv.conf.
type resolver struct {
	servers, searches, options []string
}

func parseResolvConf(b []byte) resolver {
	var r resolver
	sc := bufio.NewScanner(bytes.NewReader(b))
	for sc.Scan() {
		line := sc.Text()
		if i := strings.IndexAny(line, "#;"); i >= 0 {
			line = line[:i]
		}
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			r.servers = append(r.servers, f[1])
		case "search":
			r.searches = nil // the last one counts
			for _, s := range f[1:] {
				if s = strings.TrimSuffix(s, "."); s == "" {
					s = "."
				}
				r.searches = append(r.searches, s)
			}
		case "options":
			r.options = append(r.options, f[1:]...)
		}
	}
	return r
}

func (a *Agent) dnsConfig(pod *corev1.Pod) (*runtimeapi.DNSConfig, error) {
	b, err := os.ReadFile(a.cfg.ResolvConf)
	if err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("read %s: %w", a.cfg.ResolvConf, err)
	}
	r := podResolver(pod, parseResolvConf(b), a.cfg.ClusterDNS, a.cfg.ClusterDomain)
	return &runtimeapi.DNSConfig{Servers: r.servers, Searches: r.searches, Options: r.options}, nil
}

// podResolver decides a pod's resolver configuration from its policy and the node's own.
func podResolver(pod *corev1.Pod, node resolver, clusterDNS []string, domain string) resolver {
	var r resolver
	policy := pod.Spec.DNSPolicy
	if policy == corev1.DNSClusterFirst && pod.Spec.HostNetwork {
		policy = corev1.DNSDefault
	}
	switch policy {
	case corev1.DNSNone:
	case corev1.DNSDefault:
		r = node
	default:
		r.servers = append(r.servers, clusterDNS...)
		r.searches = append([]string{pod.Namespace + ".svc." + domain, "svc." + domain, domain}, node.searches...)
		r.options = []string{"ndots:5"}
	}
	if c := pod.Spec.DNSConfig; c != nil {
		r.servers = append(r.servers, c.Nameservers...)
		r.searches = append(r.searches, c.Searches...)
		r.options = mergeOptions(r.options, c.Options)
	}
	r.servers = unique(r.servers)
	r.searches = unique(r.searches)
	r.servers = r.servers[:min(len(r.servers), maxNameservers)]
	r.searches = r.searches[:min(len(r.searches), maxSearches)]
	for len(strings.Join(r.searches, " ")) > maxSearchChars {
		r.searches = r.searches[:len(r.searches)-1]
	}
	return r
}

func unique(in []string) []string {
	seen := map[string]bool{}
	out := in[:0:0]
	for _, s := range in {
		if !seen[s] {
			seen[s] = true
			out = append(out, s)
		}
	}
	return out
}

func mergeOptions(base []string, more []corev1.PodDNSConfigOption) []string {
	m := map[string]string{}
	for _, o := range base {
		k, v, _ := strings.Cut(o, ":")
		m[k] = v
	}
	for _, o := range more {
		m[o.Name] = ""
		if o.Value != nil {
			m[o.Name] = *o.Value
		}
	}
	out := make([]string, 0, len(m))
	for k, v := range m {
		if v != "" {
			k += ":" + v
		}
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}

// hostname is a pod's host name and the domain it is known under (empty without a subdomain).
func (a *Agent) hostname(pod *corev1.Pod) (host, domain string) {
	if o := pod.Spec.HostnameOverride; o != nil && *o != "" {
		return *o, ""
	}
	host = pod.Name
	if pod.Spec.Hostname != "" {
		host = pod.Spec.Hostname
	}
	if len(host) > maxHostname {
		host = strings.TrimRight(host[:maxHostname], "-.")
	}
	if pod.Spec.Subdomain != "" {
		domain = pod.Spec.Subdomain + "." + pod.Namespace + ".svc." + a.cfg.ClusterDomain
	}
	if f := pod.Spec.SetHostnameAsFQDN; f != nil && *f && domain != "" && len(host)+1+len(domain) <= maxFQDN {
		host += "." + domain
	}
	return host, domain
}

// hostsContent is a pod's /etc/hosts.
func hostsContent(pod *corev1.Pod, ips []string, host, domain string, node []byte) []byte {
	var b bytes.Buffer
	if pod.Spec.HostNetwork {
		b.WriteString("# Kubernetes-managed hosts file (host network).\n")
		b.Write(node)
	} else {
		b.WriteString("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n" +
			"fe00::\tip6-localnet\nfe00::\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n")
		for _, ip := range ips {
			b.WriteString(ip + "\t")
			if domain != "" {
				b.WriteString(host + "." + domain + "\t")
			}
			b.WriteString(host + "\n")
		}
	}
	if len(pod.Spec.HostAliases) > 0 {
		b.WriteString("\n# Entries added by HostAliases.\n")
		for _, al := range pod.Spec.HostAliases {
			b.WriteString(al.IP + "\t" + strings.Join(al.Hostnames, "\t") + "\n")
		}
	}
	return b.Bytes()
}

// hostsFile writes a pod's hosts file and returns its path. The file is rewritten in place: containers have it mounted.
func (w *worker) hostsFile(pod *corev1.Pod, ips []string) (string, error) {
	name := filepath.Join(w.a.volumes.PodDir(pod.UID), "etc-hosts")
	var node []byte
	if pod.Spec.HostNetwork {
		b, err := os.ReadFile(w.a.cfg.HostsFile)
		if err != nil && !os.IsNotExist(err) {
			return "", fmt.Errorf("read %s: %w", w.a.cfg.HostsFile, err)
		}
		node = b
	}
	host, domain := w.a.hostname(pod)
	want := hostsContent(pod, ips, host, domain, node)
	if have, err := os.ReadFile(name); err == nil && (bytes.Equal(have, want) || pod.Spec.HostNetwork) {
		return name, nil
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o750); err != nil {
		return "", err
	}
	if err := os.WriteFile(name, want, 0o644); err != nil {
		return "", err
	}
	return name, os.Chmod(name, 0o644)
}
