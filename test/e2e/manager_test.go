package e2e

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"

	"skein.io/skein/gossip/identity"
)

// gadgetYAML are the kind and the webhooks of the operator; %[1]s is where they are served, %[2]s who signed the certificate.
const gadgetYAML = `apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: gadgets.clients.skein.io}
spec:
  group: clients.skein.io
  scope: Namespaced
  names: {plural: gadgets, singular: gadget, kind: Gadget}
  conversion:
    strategy: Webhook
    webhook:
      conversionReviewVersions: [v1]
      clientConfig: {url: "https://%[1]s/convert", caBundle: %[2]s}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}}
    schema: {openAPIV3Schema: {type: object, properties: {
      spec: {type: object, required: [size], properties: {size: {type: integer}, color: {type: string}}},
      status: {type: object, properties: {size: {type: integer}, observedGeneration: {type: integer}, by: {type: string}}}}}}
  - name: v1alpha1
    served: true
    storage: false
    subresources: {status: {}}
    schema: {openAPIV3Schema: {type: object, properties: {
      spec: {type: object, properties: {width: {type: string}, color: {type: string}}},
      status: {type: object, properties: {size: {type: integer}, observedGeneration: {type: integer}, by: {type: string}}}}}}
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingWebhookConfiguration
metadata: {name: gadgets}
webhooks:
- name: default.clients.skein.io
  clientConfig: {url: "https://%[1]s/mutate-clients-skein-io-v1-gadget", caBundle: %[2]s}
  rules: [{apiGroups: [clients.skein.io], apiVersions: [v1], operations: [CREATE, UPDATE], resources: [gadgets]}]
  sideEffects: None
  admissionReviewVersions: [v1]
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: gadgets}
webhooks:
- name: validate.clients.skein.io
  clientConfig: {url: "https://%[1]s/validate-clients-skein-io-v1-gadget", caBundle: %[2]s}
  rules: [{apiGroups: [clients.skein.io], apiVersions: [v1], operations: [CREATE, UPDATE], resources: [gadgets]}]
  sideEffects: None
  admissionReviewVersions: [v1]
`

// warnings keeps what the API warned of.
type warnings struct {
	mu  sync.Mutex // guards all
	all []string
}

// HandleWarningHeader implements rest.WarningHandler.
func (w *warnings) HandleWarningHeader(_ int, _, text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all = append(w.all, text)
}

func (w *warnings) said(text string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Contains(w.all, text)
}

// operator is a running manager.
type operator struct {
	cmd *exec.Cmd
	out *os.File
}

func (o operator) elected() error {
	b, err := os.ReadFile(o.out.Name())
	if err == nil && !bytes.Contains(b, []byte("elected\n")) {
		err = fmt.Errorf("it says %q", b)
	}
	return err
}

// operate starts a manager on a node; it uses the API through n4.
func (w *world) operate(t *testing.T, node, dir string) operator {
	t.Helper()
	cmd := get(w.node(node).Command(background, bin+"/skein-manager", "on-"+node, w.node(node).IP().String()+":9443", dir))(t)
	cmd.Env = append(cmd.Env, "KUBECONFIG="+w.kubeconfig("n4"))
	out := get(os.Create(filepath.Join(dir, node+".log")))(t)
	cmd.Stdout, cmd.Stderr = out, out
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		out.Close()
		if b, err := os.ReadFile(out.Name()); err == nil && t.Failed() {
			t.Logf("manager on %s: %s", node, b)
		}
	})
	return operator{cmd, out}
}

// manager runs an operator on controller-runtime, twice, and kills the cluster's leader and then its own.
func (w *world) manager(t *testing.T) {
	dir := filepath.Join(w.lab.Dir(), "operator")
	must(t, os.MkdirAll(dir, 0o755))
	ca := get(identity.NewAuthority("operator", time.Now(), rand.Reader))(t)
	hooks := w.node("n4").IP()
	cert := get(ca.IssueServer("operator", nil, []netip.Addr{hooks, w.node("n2").IP()}, time.Hour, time.Now()))(t)
	var chain []byte
	for _, der := range cert.Certificate {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	must(t, os.WriteFile(filepath.Join(dir, "tls.crt"), chain, 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "tls.key"), get(identity.EncodeKey(cert.PrivateKey.(*ecdsa.PrivateKey)))(t), 0o600))
	w.apply(t, "n1", fmt.Sprintf(gadgetYAML, netip.AddrPortFrom(hooks, 9443), base64.StdEncoding.EncodeToString(ca.CertPEM())))
	first := w.operate(t, "n2", dir)
	eventually(t, 20*time.Second, "the first manager leads", first.elected)
	second := w.operate(t, "n4", dir) // its webhooks are the ones that are asked

	w.mu.Lock()
	cfg := w.configFor("n3", w.lab.DialContext)
	w.mu.Unlock()
	warned := &warnings{}
	cfg.WarningHandler = warned
	dyn := get(dynamic.NewForConfig(cfg))(t)
	gadgets := func(version string) dynamic.ResourceInterface {
		return dyn.Resource(schema.GroupVersionResource{Group: "clients.skein.io", Version: version, Resource: "gadgets"}).Namespace("default")
	}
	makeOne := func(version, name string, spec map[string]any) error {
		ctx, cancel := timeout(4 * time.Second)
		defer cancel()
		_, err := gadgets(version).Create(ctx, &unstructured.Unstructured{Object: map[string]any{"apiVersion": "clients.skein.io/" + version, "kind": "Gadget",
			"metadata": map[string]any{"name": name}, "spec": spec}}, metav1.CreateOptions{})
		return err
	}
	field := func(version, name string, path ...string) (v any, err error) {
		ctx, cancel := timeout(4 * time.Second)
		defer cancel()
		g, err := gadgets(version).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		v, _, err = unstructured.NestedFieldNoCopy(g.Object, path...)
		return v, err
	}
	is := func(want any, version, name string, path ...string) error {
		v, err := field(version, name, path...)
		if err == nil && v != want {
			err = fmt.Errorf("%s of %s is %v, want %v", strings.Join(path, "."), name, v, want)
		}
		return err
	}
	reconciled := func(name string, size int64) error {
		if err := is(size, "v1", name, "status", "size"); err != nil {
			return err
		}
		m, err := w.on("n1").CoreV1().ConfigMaps("default").Get(background, name, metav1.GetOptions{})
		if err == nil && m.Data["size"] != fmt.Sprint(size) {
			err = fmt.Errorf("ConfigMap %s has %v", name, m.Data)
		}
		return err
	}
	eventually(t, 30*time.Second, "a gadget can be made", func() error { return makeOne("v1", "plain", map[string]any{"size": int64(5)}) })
	must(t, is("grey", "v1", "plain", "spec", "color"))
	eventually(t, 20*time.Second, "it is reconciled", func() error { return reconciled("plain", 5) })
	must(t, is("on-n2", "v1", "plain", "status", "by"))
	must(t, makeOne("v1alpha1", "old", map[string]any{"width": "7mm", "color": "blue"}))
	must(t, is(int64(7), "v1", "old", "spec", "size"))
	must(t, is("5mm", "v1alpha1", "plain", "spec", "width"))
	eventually(t, 20*time.Second, "the old one is reconciled", func() error { return reconciled("old", 7) })
	if err := makeOne("v1", "huge", map[string]any{"size": int64(101)}); err == nil || !strings.Contains(err.Error(), "size 101 would not fit") {
		t.Errorf("a gadget that is too large: %v", err)
	}
	if err := makeOne("v1alpha1", "odd", map[string]any{"width": "wide"}); err == nil || !strings.Contains(err.Error(), `width "wide" is not like 5mm`) {
		t.Errorf("one that cannot be converted: %v", err)
	}
	if err := makeOne("v1", "typed", map[string]any{"size": "5"}); err == nil || !strings.Contains(err.Error(), "spec.size") {
		t.Errorf("one against the schema: %v", err)
	}

	// The cluster's leader dies under the operator.
	leader := w.leaderOf(t, "system")
	made, last := 0, 0
	var died time.Time
	for i := 0; i < 60; i++ {
		if i == 10 {
			must(t, w.node(leader).KillDaemon(background))
			died = time.Now()
			w.hangUp(leader)
		}
		name := fmt.Sprintf("many-%d", i)
		err := makeOne("v1", name, map[string]any{"size": int64(i + 1)})
		if err == nil {
			made++
			last = i
			defer func() { must(t, reconciled(name, int64(i+1))) }()
		}
		time.Sleep(20 * time.Millisecond)
	}
	must(t, w.node(leader).Start(background, nil))
	if made < 30 {
		t.Errorf("only %d of 60 gadgets could be made while the leader died", made)
	}
	eventually(t, 30*time.Second, "the operator goes on", func() error { return reconciled(fmt.Sprintf("many-%d", last), int64(last+1)) })
	t.Logf("the leader %s was killed: %d of 60 gadgets made, the last one reconciled %s after the death", leader, made, time.Since(died).Round(10*time.Millisecond))
	eventually(t, 40*time.Second, leader+" works", func() error { return w.healthy(leader) })
	if err := second.elected(); err == nil {
		t.Error("the second manager was elected though the first one lived")
	}

	must(t, first.cmd.Process.Kill())
	took := eventually(t, 25*time.Second, "the second manager takes over", second.elected)
	t.Logf("the second manager leads %s after the death of the first", took)
	must(t, makeOne("v1", "after", map[string]any{"size": int64(60)}))
	eventually(t, 20*time.Second, "it reconciles", func() error { return reconciled("after", 60) })
	must(t, is("on-n4", "v1", "after", "status", "by"))
	if !warned.said("that is a large gadget") {
		t.Error("the validator's warning did not arrive")
	}
	ctx, cancel := context.WithTimeout(background, 10*time.Second)
	defer cancel()
	must(t, gadgets("v1").Delete(ctx, "after", metav1.DeleteOptions{}))
	eventually(t, 20*time.Second, "what it owned goes with it", func() error {
		_, err := w.on("n1").CoreV1().ConfigMaps("default").Get(background, "after", metav1.GetOptions{})
		if err == nil {
			return fmt.Errorf("the ConfigMap is still there")
		}
		return nil
	})
}
