package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/connrotation"

	"skein.io/skein/test/cluster"
)

// TestServiceAddresses gives a running cluster a second range of Service addresses, node by node, then makes and deletes Services through
// all three API servers at once while leaders die: no address and no node port ever has two owners, and none is lost.
func TestServiceAddresses(t *testing.T) {
	w := &world{lab: cluster.ForTest(t, 3, cluster.Config{}), conns: map[string]*connrotation.Dialer{}, kubes: map[string]*kubernetes.Clientset{}}
	defer func() {
		if t.Failed() {
			w.dump(t)
		}
	}()
	w.begin(t)
	nodes := []string{"n1", "n2", "n3"}
	const both = "--service-cidr=10.96.0.0/16,fd00:96::/112"
	for i, n := range nodes {
		w.powerOff(t, n)
		via := ""
		if n != "n1" {
			via = "n1"
		}
		w.start(t, n, via, both)
		eventually(t, 40*time.Second, n+" works", func() error { return w.healthy(n) })
		w.awaitReady(t, n, nodes[(i+1)%3], 40*time.Second)
	}
	eventually(t, 20*time.Second, "both ranges", func() error {
		ctx, cancel := timeout(3 * time.Second)
		defer cancel()
		c, err := w.on("n1").NetworkingV1().ServiceCIDRs().Get(ctx, "kubernetes", metav1.GetOptions{})
		if err == nil && !slices.Contains(c.Spec.CIDRs, "fd00:96::/112") {
			err = fmt.Errorf("ranges %v", c.Spec.CIDRs)
		}
		return err
	})
	made := w.makeServices(t, nodes)
	t.Logf("%d Services were made and %d deleted", made.created.Load(), made.deleted.Load())
	if made.created.Load() < 60 {
		t.Errorf("only %d Services were made: the test shows nothing", made.created.Load())
	}
	eventually(t, 20*time.Second, "every address has one owner", func() error { return w.owned("n2", false) })
	if os.Getenv("SKEIN_LONG") != "" { // what a death left between an address and its Service is taken for one under way for a minute
		eventually(t, 4*time.Minute, "no address is lost", func() error { return w.owned("n2", true) })
	}
}

type services struct{ created, deleted atomic.Int64 }

// makeServices lets two writers at each node make Services of every sort, while the leader is killed twice.
func (w *world) makeServices(t *testing.T, nodes []string) *services {
	t.Helper()
	var s services
	ctx, stop := context.WithCancel(background)
	var wg sync.WaitGroup
	dual, six := corev1.IPFamilyPolicyRequireDualStack, []corev1.IPFamily{corev1.IPv6Protocol}
	for n, node := range nodes {
		for k := range 2 {
			wg.Go(func() {
				for i := 0; ctx.Err() == nil && i < 400; i++ {
					v := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("a-%s-%d-%d", node, k, i)},
						Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}}
					switch i % 5 {
					case 0:
						v.Spec.IPFamilyPolicy = &dual
					case 1:
						v.Spec.IPFamilies = six
					case 2:
						v.Spec.ClusterIP = fmt.Sprintf("10.96.200.%d", 1+i/5%200) // which the others want, too
					case 3:
						v.Spec.Type, v.Spec.Ports[0].NodePort = corev1.ServiceTypeNodePort, int32(30000+i/5%200)
					default:
						v.Spec.Type, v.Spec.IPFamilyPolicy = corev1.ServiceTypeNodePort, &dual
					}
					c, cancel := context.WithTimeout(ctx, 4*time.Second)
					if _, err := w.on(node).CoreV1().Services("default").Create(c, v, metav1.CreateOptions{}); err == nil {
						s.created.Add(1)
						if i%3 == 0 && w.on(nodes[(n+1)%3]).CoreV1().Services("default").Delete(c, v.Name, metav1.DeleteOptions{}) == nil {
							s.deleted.Add(1)
						}
					} else if c.Err() == nil {
						time.Sleep(20 * time.Millisecond) // nobody there
					}
					cancel()
				}
			})
		}
	}
	for range 2 {
		time.Sleep(3 * time.Second) // of work under one leader
		leader := get(w.leader("n1"))(t)
		w.powerOff(t, leader)
		time.Sleep(3 * time.Second) // under the next
		w.powerOn(t, leader, nodes[(slices.Index(nodes, leader)+1)%3])
	}
	stop()
	wg.Wait()
	return &s
}

// owned compares the Services with what keeps their addresses. Addresses that nobody has count if strict.
func (w *world) owned(asks string, strict bool) error {
	ctx, cancel := timeout(10 * time.Second)
	defer cancel()
	list, err := w.on(asks).CoreV1().Services("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	kept, err := w.on(asks).NetworkingV1().IPAddresses().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	var errs []error
	owner, ports := map[string]string{}, map[int32]string{}
	for _, s := range list.Items {
		for _, a := range s.Spec.ClusterIPs {
			if o := owner[a]; o != "" {
				errs = append(errs, fmt.Errorf("%s has the address %s of %s", s.Name, a, o))
			}
			owner[a] = s.Name
		}
		for _, p := range s.Spec.Ports {
			if o := ports[p.NodePort]; o != "" && p.NodePort != 0 {
				errs = append(errs, fmt.Errorf("%s has the port %d of %s", s.Name, p.NodePort, o))
			}
			ports[p.NodePort] = s.Name
		}
	}
	lost := 0
	for _, ip := range kept.Items {
		if owner[ip.Name] == "" {
			lost++
		} else if owner[ip.Name] != ip.Spec.ParentRef.Name {
			errs = append(errs, fmt.Errorf("%s of %s is kept for %s", ip.Name, owner[ip.Name], ip.Spec.ParentRef.Name))
		}
		delete(owner, ip.Name)
	}
	if len(owner) > 0 {
		errs = append(errs, fmt.Errorf("nothing keeps %v", owner))
	}
	if strict && lost > 0 {
		errs = append(errs, fmt.Errorf("%d addresses belong to nobody", lost))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%d Services: %s", len(list.Items), strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return nil
}
