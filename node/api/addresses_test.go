package api

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
)

var (
	v4only = []corev1.IPFamily{corev1.IPv4Protocol}
	v6only = []corev1.IPFamily{corev1.IPv6Protocol}
	v6v4   = []corev1.IPFamily{corev1.IPv6Protocol, corev1.IPv4Protocol}
)

func aService(name string, change func(*corev1.ServiceSpec)) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}}
	if change != nil {
		change(&s.Spec)
	}
	return s
}

// Families of the addresses, as a text: "46" is IPv4 and then IPv6.
func families(s *corev1.Service) (out string) {
	for _, a := range s.Spec.ClusterIPs {
		ip, err := netip.ParseAddr(a)
		switch {
		case err != nil:
			out += "?"
		case ip.Is4():
			out += "4"
		default:
			out += "6"
		}
	}
	return out
}

// Services get addresses of the families that they ask for.
func TestServiceFamilies(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	for n, c := range []struct {
		policy   corev1.IPFamilyPolicy
		families []corev1.IPFamily
		want     string
	}{
		{"", nil, "4"}, {corev1.IPFamilyPolicySingleStack, nil, "4"}, {"", v6only, "6"}, {corev1.IPFamilyPolicySingleStack, v6only, "6"},
		{corev1.IPFamilyPolicyPreferDualStack, nil, "46"}, {corev1.IPFamilyPolicyRequireDualStack, nil, "46"},
		{corev1.IPFamilyPolicyRequireDualStack, v6v4, "64"}, {corev1.IPFamilyPolicyPreferDualStack, v6only, "64"}, {"", v4only, "4"},
	} {
		s, err := k.CoreV1().Services(ns).Create(ctx, aService(fmt.Sprint("s", n), func(s *corev1.ServiceSpec) {
			if s.IPFamilies = c.families; c.policy != "" {
				s.IPFamilyPolicy = &c.policy
			}
		}), metav1.CreateOptions{})
		if err != nil || families(s) != c.want || len(s.Spec.IPFamilies) != len(c.want) || s.Spec.IPFamilyPolicy == nil {
			t.Fatalf("policy %q, families %v: %v, %+v", c.policy, c.families, err, s)
		}
		for _, a := range s.Spec.ClusterIPs {
			ip, err := k.NetworkingV1().IPAddresses().Get(ctx, a, metav1.GetOptions{})
			if err != nil || ip.Spec.ParentRef.Name != s.Name || ip.Spec.ParentRef.Namespace != ns || ip.Spec.ParentRef.Resource != "services" {
				t.Errorf("address %s of %s: %v, %+v", a, s.Name, err, ip)
			}
		}
	}
	// From one family to two, and back: the first address stays, the second is free again.
	s, err := k.CoreV1().Services(ns).Get(ctx, "s0", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	first := s.Spec.ClusterIP
	change := func(policy string, more string) *corev1.Service {
		t.Helper()
		s, err := k.CoreV1().Services(ns).Patch(ctx, "s0", types.MergePatchType, fmt.Appendf(nil, `{"spec":{"ipFamilyPolicy":%q%s}}`, policy, more), metav1.PatchOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s = change("PreferDualStack", "")
	if families(s) != "46" || s.Spec.ClusterIP != first {
		t.Fatalf("upgraded: %+v", s.Spec)
	}
	second := s.Spec.ClusterIPs[1]
	s = change("SingleStack", fmt.Sprintf(`,"clusterIPs":[%q],"ipFamilies":["IPv4"]`, first))
	if families(s) != "4" || s.Spec.ClusterIP != first {
		t.Fatalf("back again: %+v", s.Spec)
	}
	eventually(t, func(ctx context.Context) error { // a moment after it is nobody's
		if _, err := k.NetworkingV1().IPAddresses().Get(ctx, second, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("the second address: %w", err)
		}
		return nil
	})
}

// What cannot be had is refused in upstream's words.
func TestServiceAddressesRefused(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	given, err := k.CoreV1().Services(ns).Create(ctx, aService("given", func(s *corev1.ServiceSpec) {
		s.Type, s.ClusterIP, s.Ports[0].NodePort = corev1.ServiceTypeNodePort, "10.96.77.7", 31777
	}), metav1.CreateOptions{})
	if err != nil || given.Spec.ClusterIP != "10.96.77.7" || given.Spec.Ports[0].NodePort != 31777 {
		t.Fatalf("%v, %+v", err, given)
	}
	for _, c := range []struct {
		change func(*corev1.ServiceSpec)
		want   string
	}{
		{func(s *corev1.ServiceSpec) { s.ClusterIP = "10.96.77.7" }, "failed to allocate IP 10.96.77.7: provided IP is already allocated"},
		{func(s *corev1.ServiceSpec) { s.ClusterIP = "192.168.9.9" }, "192.168.9.9"},
		{func(s *corev1.ServiceSpec) { s.ClusterIP = "no address" }, "must be a valid IP address"},
		{func(s *corev1.ServiceSpec) { s.ClusterIP, s.IPFamilies = "fd00:96::7", v4only }, "expected an IPv4 value as indicated by `ipFamilies[0]`"},
		{func(s *corev1.ServiceSpec) { s.Type, s.Ports[0].NodePort = corev1.ServiceTypeNodePort, 31777 }, "provided port is already allocated"},
		{func(s *corev1.ServiceSpec) { s.Type, s.Ports[0].NodePort = corev1.ServiceTypeNodePort, 80 }, "provided port is not in the valid range. The range of valid ports is 30000-32767"},
		{func(s *corev1.ServiceSpec) { s.IPFamilies = []corev1.IPFamily{"IPv5"} }, "Unsupported value"},
	} {
		_, err := k.CoreV1().Services(ns).Create(ctx, aService("bad", c.change), metav1.CreateOptions{})
		if !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, want %q", err, c.want)
		}
	}
	// An address that was refused together with a port is not lost.
	_, err = k.CoreV1().Services(ns).Create(ctx, aService("half", func(s *corev1.ServiceSpec) {
		s.Type, s.ClusterIP, s.Ports[0].NodePort = corev1.ServiceTypeNodePort, "10.96.77.8", 31777
	}), metav1.CreateOptions{})
	if !apierrors.IsInvalid(err) {
		t.Fatal(err)
	}
	if _, err := k.CoreV1().Services(ns).Create(ctx, aService("whole", func(s *corev1.ServiceSpec) { s.ClusterIP = "10.96.77.8" }), metav1.CreateOptions{}); err != nil {
		t.Error(err)
	}
	// Of a Service that is deleted all is free.
	if err := k.CoreV1().Services(ns).Delete(ctx, "given", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.CoreV1().Services(ns).Create(ctx, given2("again"), metav1.CreateOptions{}); err != nil {
		t.Error(err)
	}
}

func given2(name string) *corev1.Service {
	return aService(name, func(s *corev1.ServiceSpec) {
		s.Type, s.ClusterIP, s.Ports[0].NodePort = corev1.ServiceTypeNodePort, "10.96.77.7", 31777
	})
}

// owned checks that no two Services have an address or a node port in common, and that exactly their addresses are taken.
func owned(ctx context.Context, k kubernetes.Interface) error {
	list, err := k.CoreV1().Services("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	owner, ports := map[string]string{}, map[int32]string{}
	var errs []error
	for _, s := range list.Items {
		name := s.Namespace + "/" + s.Name
		for _, a := range s.Spec.ClusterIPs {
			if a == corev1.ClusterIPNone {
				continue
			}
			if o, taken := owner[a]; taken {
				errs = append(errs, fmt.Errorf("%s has the address %s of %s", name, a, o))
			}
			owner[a] = name
		}
		for _, p := range s.Spec.Ports {
			if o, taken := ports[p.NodePort]; taken && p.NodePort != 0 {
				errs = append(errs, fmt.Errorf("%s has the port %d of %s", name, p.NodePort, o))
			}
			ports[p.NodePort] = name
		}
	}
	taken, err := k.NetworkingV1().IPAddresses().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, ip := range taken.Items {
		if o := ip.Spec.ParentRef.Namespace + "/" + ip.Spec.ParentRef.Name; owner[ip.Name] != o && ip.Spec.ParentRef.Name != "never-made" {
			errs = append(errs, fmt.Errorf("%s is kept for %s, it is of %q", ip.Name, o, owner[ip.Name]))
		}
		delete(owner, ip.Name)
	}
	if len(owner) > 0 {
		errs = append(errs, fmt.Errorf("nothing keeps %v", owner))
	}
	return errors.Join(errs...)
}

// Many make and delete Services through both servers at once, of both families and with node ports, in a range that is nearly
// used up: nothing is given twice, nothing is lost.
func TestServiceAddressesTogether(t *testing.T) {
	ctx := t.Context()
	k := []kubernetes.Interface{admin(t), client(t, cluster.as(cluster.servers[1], "admin", "system:masters"))}
	ns := namespace(t, k[0])
	both := corev1.IPFamilyPolicyRequireDualStack
	var wg sync.WaitGroup
	for w := range 6 {
		wg.Go(func() {
			for i := range 12 {
				s := aService(fmt.Sprintf("w%d-%d", w, i), func(s *corev1.ServiceSpec) {
					s.Type = corev1.ServiceTypeNodePort
					s.Ports[0].NodePort = int32(32000 + i%6) // wanted by all
					if i%3 != 0 {
						s.Ports[0].NodePort = 0
					}
					if i%2 == 0 {
						s.IPFamilyPolicy = &both
					}
				})
				api := k[(w+i)%2].CoreV1().Services(ns)
				_, err := api.Create(ctx, s, metav1.CreateOptions{})
				if err != nil && !apierrors.IsInvalid(err) {
					t.Errorf("create %s: %v", s.Name, err)
				}
				if err == nil && i%4 == 1 {
					if err := k[w%2].CoreV1().Services(ns).Delete(ctx, s.Name, metav1.DeleteOptions{}); err != nil {
						t.Errorf("delete %s: %v", s.Name, err)
					}
				}
			}
		})
	}
	wg.Wait()
	eventually(t, func(ctx context.Context) error { return owned(ctx, k[0]) })
	list, err := k[0].CoreV1().Services(ns).List(ctx, metav1.ListOptions{})
	if err != nil || len(list.Items) < 30 {
		t.Errorf("%d Services, %v", len(list.Items), err)
	}
}

// What a crash between an address and its Service leaves is repaired, and nobody takes away the address of a Service.
func TestServiceAddressRepair(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	s, err := k.CoreV1().Services(ns).Create(ctx, aService("kept", nil), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ips := k.NetworkingV1().IPAddresses()
	err = ips.Delete(ctx, s.Spec.ClusterIP, metav1.DeleteOptions{})
	if !apierrors.IsConflict(err) || !strings.Contains(err.Error(), "Service "+ns+"/kept has this address") {
		t.Errorf("the address of a Service is deleted: %v", err)
	}
	if err := ips.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{FieldSelector: "metadata.name=" + s.Spec.ClusterIP}); !apierrors.IsConflict(err) {
		t.Errorf("with others: %v", err)
	}
	// In the store nothing keeps it: it has to be made again.
	if _, err := cluster.store.KV.Delete(ctx, "/registry/ipaddresses/"+s.Spec.ClusterIP); err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		if _, err := k.CoreV1().Services(ns).Patch(ctx, "kept", types.MergePatchType, fmt.Appendf(nil, `{"metadata":{"annotations":{"x":%q}}}`, time.Now()), metav1.PatchOptions{}); err != nil {
			return err // a change, so that the repair looks at it before its next round
		}
		_, err := ips.Get(ctx, s.Spec.ClusterIP, metav1.GetOptions{})
		return err
	})
	// And one without a Service goes, after the minute that a creation may take.
	orphan := &networkingv1.IPAddress{ObjectMeta: metav1.ObjectMeta{Name: "10.96.99.99", Labels: map[string]string{
		networkingv1.LabelIPAddressFamily: "IPv4", networkingv1.LabelManagedBy: "ipallocator.k8s.io"}},
		Spec: networkingv1.IPAddressSpec{ParentRef: &networkingv1.ParentReference{Resource: "services", Namespace: ns, Name: "never-made"}}}
	if _, err := ips.Create(ctx, orphan, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if os.Getenv("SKEIN_LONG") == "" {
		return
	}
	eventually(t, func(ctx context.Context) error {
		if _, err := ips.Get(ctx, orphan.Name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("it is still there: %w", err)
		}
		return nil
	})
}

// A server that starts finds out which node ports are in use, also if the store's record of them is lost.
func TestNodePortRepair(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	node := func(name string) *corev1.Service {
		return aService(name, func(s *corev1.ServiceSpec) { s.Type, s.Ports[0].NodePort = corev1.ServiceTypeNodePort, 31999 })
	}
	if _, err := k.CoreV1().Services(ns).Create(ctx, node("has"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if n, err := cluster.store.KV.Delete(ctx, "/registry/ranges/servicenodeports"); err != nil || n.Deleted != 1 {
		t.Fatalf("%d records of node ports, %v", n.Deleted, err)
	}
	k = client(t, cluster.as(another(t, func(*Config) {}), "admin", "system:masters"))
	if s, err := k.CoreV1().Services(ns).Create(ctx, node("wants"), metav1.CreateOptions{}); !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), "provided port is already allocated") {
		t.Errorf("the port of another Service: %v, %+v", err, s)
	}
	if err := k.CoreV1().Services(ns).Delete(ctx, "has", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.CoreV1().Services(ns).Create(ctx, node("wants"), metav1.CreateOptions{}); err != nil {
		t.Error(err)
	}
}

// A range is added, used and removed: it stays until the last address of it is free.
func TestServiceCIDR(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	api := k.NetworkingV1().ServiceCIDRs()
	if d, err := api.Get(ctx, "kubernetes", metav1.GetOptions{}); err != nil || !slices.Equal(d.Spec.CIDRs, []string{"10.96.0.0/16", "fd00:96::/112"}) {
		t.Fatalf("the cluster's own: %v, %+v", err, d)
	}
	_, err := api.Create(ctx, &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "more"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.200.0.0/28"}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ready := func(want metav1.ConditionStatus) func(context.Context) error {
		return func(ctx context.Context) error {
			c, err := api.Get(ctx, "more", metav1.GetOptions{})
			if err != nil {
				return err
			}
			if r := meta.FindStatusCondition(c.Status.Conditions, networkingv1.ServiceCIDRConditionReady); r == nil || r.Status != want || len(c.Finalizers) == 0 {
				return fmt.Errorf("finalizers %v, conditions %+v", c.Finalizers, c.Status.Conditions)
			}
			return nil
		}
	}
	eventually(t, ready(metav1.ConditionTrue))
	eventually(t, func(ctx context.Context) error { // the allocators of a server hear of it a moment later
		_, err := k.CoreV1().Services(ns).Create(ctx, aService("there", func(s *corev1.ServiceSpec) { s.ClusterIP = "10.200.0.5" }), metav1.CreateOptions{})
		return err
	})
	if err := api.Delete(ctx, "more", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, ready(metav1.ConditionFalse))
	_, err = k.CoreV1().Services(ns).Create(ctx, aService("late", func(s *corev1.ServiceSpec) { s.ClusterIP = "10.200.0.6" }), metav1.CreateOptions{})
	for _, name := range []string{"there", "late"} {
		if name == "late" && err != nil {
			break
		}
		if err := k.CoreV1().Services(ns).Delete(ctx, name, metav1.DeleteOptions{}); err != nil { // a server that had not heard of it yet gave one
			t.Fatal(err)
		}
	}
	eventually(t, func(ctx context.Context) error {
		if _, err := api.Get(ctx, "more", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("it is still there: %w", err)
		}
		return nil
	})
}
