package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// webYAML is a Deployment, a Service with a fixed node port and a headless one.
const webYAML = `apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 6
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: skein.local/web:1
        imagePullPolicy: IfNotPresent
        ports: [{containerPort: 8080}]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
        # As everywhere with Kubernetes: a pod is told to end when the others begin to hear of it, so it serves on for a moment.
        lifecycle: {preStop: {sleep: {seconds: 3}}}
        env:
        - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: RELEASE, value: "1"}
        resources: {requests: {cpu: 10m, memory: 16Mi}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  clusterIP: 10.96.7.7
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080, nodePort: 30080}]
---
apiVersion: v1
kind: Service
metadata: {name: web-pods}
spec:
  clusterIP: None
  selector: {app: web}
  ports: [{port: 8080}]
`

const webURL = "http://10.96.7.7/"

// deploy shows a Deployment behind a Service from everywhere.
func (w *world) deploy(t *testing.T) {
	w.do(t, "n1", "delete", "deployment/web", "service/web", "service/web-pods", "--cascade=foreground")
	w.apply(t, "n4", webYAML) // through a node without a replica
	pods, took := w.awaitPods(t, "n5", "app=web", 6, 60*time.Second)
	t.Logf("6 pods Ready after %s", took)
	on := map[string]int{}
	for _, p := range pods {
		on[p.Spec.NodeName]++
	}
	if len(on) < 5 {
		t.Errorf("6 equal pods on 5 equal nodes should spread over all: %v", on)
	}
	for _, n := range w.others() {
		eventually(t, 10*time.Second, "the ClusterIP answers on "+n, func() error { return errOf(w.fetch(n, webURL)) })
	}
	t.Run("ClusterIP reaches every pod", func(t *testing.T) { w.allAnswer(t, "n1", webURL, pods) })
	t.Run("NodePort from outside", func(t *testing.T) {
		hc := &http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: w.lab.DialContext}}
		for _, n := range w.others() {
			url := fmt.Sprintf("http://%s:30080/", w.node(n).IP())
			seen := map[string]bool{}
			eventually(t, 20*time.Second, "all pods answer on the port of "+n, func() error {
				body, failure := fetch(hc, url)
				if failure != "" {
					return errors.New(failure)
				}
				seen[field(body, "pod")] = true
				if len(seen) < 6 {
					return fmt.Errorf("only %v", seen)
				}
				return nil
			})
		}
	})
	inPod := func(pod string, args ...string) (string, error) {
		return w.cli("n2", append([]string{"exec", pod, "--", "/app"}, args...)...)
	}
	first := pods[0].Name
	t.Run("from a pod", func(t *testing.T) {
		for _, name := range []string{"10.96.7.7", "web", "web.default", "web.default.svc", "web.default.svc.cluster.local"} {
			out, err := inPod(first, "get", "http://"+name+"/", "3")
			if err != nil || strings.Count(out, "pod=web-") != 3 {
				t.Errorf("%s: %q, %v", name, out, err)
			}
		}
	})
	t.Run("DNS", func(t *testing.T) {
		var ips []string
		for _, p := range pods {
			ips = append(ips, p.Status.PodIP)
		}
		slices.Sort(ips)
		for name, want := range map[string][]string{
			"web":                                  {"10.96.7.7"},
			"web.default.svc.cluster.local":        {"10.96.7.7"},
			"kubernetes.default.svc.cluster.local": {"10.96.0.1"},
			"web-pods":                             ips,
			"web-pods.default.svc.cluster.local":   ips,
		} {
			out, err := inPod(first, "dns", name)
			got := strings.Fields(out)
			slices.Sort(got)
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("%s is %v, %v; want %v", name, got, err, want)
			}
		}
		if _, err := inPod(first, "dns", "nothing.default.svc.cluster.local"); err == nil || !strings.Contains(err.Error(), "no such host") {
			t.Errorf("a name that does not exist: %v", err)
		}
	})
	t.Run("API from a pod", w.apiFromPod)
}

// allAnswer sends requests to a Service until each pod has answered; none may fail.
func (w *world) allAnswer(t *testing.T, node, url string, pods []corev1.Pod) {
	p := w.probe(t, node, url, 10*time.Millisecond)
	eventually(t, 20*time.Second, "all pods answer", func() error {
		seen := map[string]bool{}
		for _, s := range p.all() {
			seen[field(s.Body, "pod")] = true
		}
		for _, x := range pods {
			if !seen[x.Name] {
				return fmt.Errorf("%s does not", x.Name)
			}
		}
		return nil
	})
	if bad := failed(p.stop()); len(bad) > 0 {
		t.Errorf("%d requests failed: %+v", len(bad), bad[0])
	}
}

// apiFromPod speaks to the API as programs in pods do, with the token and the CA that every pod gets; RBAC decides.
func (w *world) apiFromPod(t *testing.T) {
	w.apply(t, "n1", `apiVersion: v1
kind: Pod
metadata: {name: client, labels: {app: client}}
spec:
  containers: [{name: c, image: skein.local/tools:1, imagePullPolicy: IfNotPresent, args: [sleep]}]
`)
	pods, _ := w.awaitPods(t, "n1", "app=client", 1, 30*time.Second)
	const dir = "/var/run/secrets/kubernetes.io/serviceaccount/"
	read := func(file string) string {
		return w.do(t, "n3", "exec", "client", "--", "cat", dir+file)
	}
	if ns := read("namespace"); ns != "default" {
		t.Errorf("namespace %q", ns)
	}
	// From the pod's own network and with its own files; TLS is verified against the name that the pod uses.
	node := w.node(pods[0].Spec.NodeName)
	ask := func(token, path string) int {
		t.Helper()
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM([]byte(read("ca.crt"))) {
			t.Fatal("ca.crt holds no certificate")
		}
		hc := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: "kubernetes.default.svc"},
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return node.DialContext(ctx, network, node.IP().String()+":6443")
			}}}
		req := get(http.NewRequest(http.MethodGet, "https://kubernetes.default.svc"+path, nil))(t)
		req.Header.Set("Authorization", "Bearer "+token)
		res := get(hc.Do(req))(t)
		res.Body.Close()
		return res.StatusCode
	}
	token := read("token")
	for path, want := range map[string]int{"/version": 200, "/api/v1/namespaces/default/secrets": 403, "/api/v1/nodes": 403} {
		if code := ask(token, path); code != want {
			t.Errorf("%s with the pod's token: %d, want %d", path, code, want)
		}
	}
	if code := ask(token+"x", "/api/v1/nodes"); code != 401 {
		t.Errorf("with a forged token: %d, want 401", code)
	}
	w.apply(t, "n1", `apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: see-nodes}
rules: [{apiGroups: [""], resources: [nodes], verbs: [get, list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: see-nodes}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: see-nodes}
subjects: [{kind: ServiceAccount, name: default, namespace: default}]
`)
	eventually(t, 10*time.Second, "a role gives what it says", func() error {
		if code := ask(token, "/api/v1/nodes"); code != 200 {
			return fmt.Errorf("HTTP %d", code)
		}
		return nil
	})
	w.do(t, "n1", "delete", "clusterrole/see-nodes", "clusterrolebinding/see-nodes")
	// And the address of the Service itself, over the datapath, from inside the pod.
	// A server that wants TLS says so to who speaks without it.
	for _, url := range []string{"http://kubernetes.default.svc:443/", "http://10.96.0.1:443/"} {
		refused(t, errOf(w.cli("n2", "exec", "client", "--", "/app", "get", url)), "requests failed")
		out, _ := w.cli("n2", "exec", "client", "--", "/app", "get", url)
		if !strings.Contains(out, "400 Bad Request") {
			t.Errorf("the kubernetes Service from a pod as %s: %q", url, out)
		}
	}
	w.do(t, "n1", "delete", "pod", "client", "--grace-period=1", "--wait=false")
}

// field takes one out of the web program's answer.
func field(body, name string) string {
	_, rest, ok := strings.Cut(" "+body, " "+name+"=")
	if !ok {
		return ""
	}
	v, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	return v
}
