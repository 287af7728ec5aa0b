package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	autoscalingv1 "k8s.io/api/autoscaling/v1"
	apiextv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
)

// gearSchema is what Gears look like; one property for each thing that schemas can do.
const gearSchema = `{
 "type": "object", "required": ["spec"],
 "x-kubernetes-validations": [{"rule": "self.metadata.name.startsWith('g')", "message": "gears begin with g"}],
 "properties": {
  "spec": {"type": "object", "required": ["teeth"],
   "x-kubernetes-validations": [
    {"rule": "self.teeth <= self.max", "messageExpression": "'%d teeth, but at most %d'.format([self.teeth, self.max])", "fieldPath": ".teeth", "reason": "FieldValueForbidden"},
    {"rule": "self.teeth >= oldSelf.teeth", "message": "teeth do not fall out"},
    {"rule": "oldSelf.hasValue() || self.max >= 2", "message": "new gears are not that small", "optionalOldSelf": true}],
   "properties": {
    "teeth": {"type": "integer", "minimum": 1, "maximum": 1000, "description": "How many teeth it has."},
    "max": {"type": "integer", "default": 100},
    "material": {"type": "string", "enum": ["steel", "brass"], "default": "steel"},
    "hub": {"type": "object", "default": {}, "properties": {"bore": {"type": "integer", "default": 5}}},
    "axis": {"type": "string", "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "axis is immutable"}]},
    "serial": {"type": "string", "pattern": "^[0-9]+$"},
    "weight": {"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]},
    "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
    "none": {"type": "string", "nullable": true},
    "bolts": {"type": "array", "maxItems": 20, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
     "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string", "maxLength": 30}, "size": {"type": "integer"}}}},
    "replicas": {"type": "integer"}}},
  "status": {"type": "object", "properties": {"phase": {"type": "string"}, "replicas": {"type": "integer"}, "selector": {"type": "string"}}}}}`

func schemaOf(t *testing.T, text string) *apiextv1.CustomResourceValidation {
	t.Helper()
	s := &apiextv1.JSONSchemaProps{}
	if err := json.Unmarshal([]byte(text), s); err != nil {
		t.Fatal(err)
	}
	return &apiextv1.CustomResourceValidation{OpenAPIV3Schema: s}
}

func TestSchemasOfCustomResources(t *testing.T) {
	selector := ".status.selector"
	crdOf(t, "gears", "Gear", func(c *apiextv1.CustomResourceDefinition) {
		c.Spec.Names.ShortNames, c.Spec.Names.Categories = []string{"gr"}, []string{"all", "machines"}
		v := &c.Spec.Versions[0]
		v.Schema = schemaOf(t, gearSchema)
		v.Subresources = &apiextv1.CustomResourceSubresources{Status: &apiextv1.CustomResourceSubresourceStatus{},
			Scale: &apiextv1.CustomResourceSubresourceScale{SpecReplicasPath: ".spec.replicas", StatusReplicasPath: ".status.replicas", LabelSelectorPath: &selector}}
		v.SelectableFields = []apiextv1.SelectableField{{JSONPath: ".spec.material"}}
		v.AdditionalPrinterColumns = []apiextv1.CustomResourceColumnDefinition{{Name: "Teeth", Type: "integer", JSONPath: ".spec.teeth"}, {Name: "Phase", Type: "string", JSONPath: ".status.phase", Priority: 1}}
	})
	ns := namespace(t, admin(t))
	gears := custom(t, cluster.servers[1], ns, "gears")
	if _, err := gears.Create(t.Context(), object("Gear", "gear", map[string]any{"spec": map[string]any{"teeth": int64(12), "axis": "x", "weight": "3kg", "junk": true, "free": map[string]any{"any": "thing"},
		"none": nil, "bolts": []any{map[string]any{"name": "a", "size": int64(1)}}}}), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Run("defaults and pruning", func(t *testing.T) { gearDefaults(t, gears) })
	t.Run("validation", func(t *testing.T) { gearValidation(t, gears) })
	t.Run("strict and apply", func(t *testing.T) { gearApply(t, gears) })
	t.Run("status and scale", func(t *testing.T) { gearSubresources(t, gears) })
	t.Run("selectable fields", func(t *testing.T) { gearFields(t, gears) })
	t.Run("tables, discovery, documents", func(t *testing.T) { gearDocuments(t, ns) })
}

func gearDefaults(t *testing.T, gears dynamic.ResourceInterface) {
	g, err := gears.Get(t.Context(), "gear", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	spec, _, err := unstructured.NestedMap(g.Object, "spec")
	if err != nil {
		t.Fatal(err)
	}
	if spec["max"] != int64(100) || spec["material"] != "steel" || spec["hub"].(map[string]any)["bore"] != int64(5) || spec["weight"] != "3kg" {
		t.Errorf("defaults: %v", spec)
	}
	if _, junk := spec["junk"]; junk || spec["free"].(map[string]any)["any"] != "thing" {
		t.Errorf("pruned: %v", spec)
	}
	if v, ok := spec["none"]; !ok || v != nil {
		t.Errorf("a null that is allowed: %v", spec)
	}
}

func gearValidation(t *testing.T, gears dynamic.ResourceInterface) {
	ctx := t.Context()
	for name, tc := range map[string]struct {
		object string // the name; empty: a patch of gear
		spec   string
		want   string
	}{
		"required":            {"g1", `{}`, "spec.teeth: Required value"},
		"minimum":             {"g1", `{"teeth":0}`, "spec.teeth: Invalid value: 0"},
		"type":                {"g1", `{"teeth":"many"}`, "spec.teeth: Invalid value: \"string\""},
		"enum":                {"g1", `{"teeth":3,"material":"wood"}`, `spec.material: Unsupported value: "wood": supported values: "steel", "brass"`},
		"pattern":             {"g1", `{"teeth":3,"serial":"x"}`, "spec.serial: Invalid value"},
		"duplicate key":       {"g1", `{"teeth":3,"bolts":[{"name":"a"},{"name":"a"}]}`, `spec.bolts[1]: Duplicate value: {"name":"a"}`},
		"rule on the name":    {"h1", `{"teeth":3}`, "gears begin with g"},
		"message expression":  {"g1", `{"teeth":9,"max":5}`, "spec.teeth: Forbidden: 9 teeth, but at most 5"},
		"without an old self": {"g1", `{"teeth":1,"max":1}`, "new gears are not that small"},
		"transition":          {"", `{"teeth":11}`, "teeth do not fall out"},
		"immutable":           {"", `{"axis":"y"}`, `spec.axis: Invalid value: "y": axis is immutable`},
		"transition is met":   {"", `{"teeth":13}`, ""},
	} {
		var err error
		if tc.object == "" {
			_, err = gears.Patch(ctx, "gear", types.MergePatchType, []byte(`{"spec":`+tc.spec+`}`), metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
		} else {
			var spec map[string]any
			if err := json.Unmarshal([]byte(tc.spec), &spec); err != nil {
				t.Fatal(err)
			}
			_, err = gears.Create(ctx, object("Gear", tc.object, map[string]any{"spec": spec}), metav1.CreateOptions{})
		}
		if tc.want == "" && err != nil || tc.want != "" && (!apierrors.IsInvalid(err) || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

func gearApply(t *testing.T, gears dynamic.ResourceInterface) {
	ctx := t.Context()
	junk := object("Gear", "g2", map[string]any{"spec": map[string]any{"teeth": int64(3), "junk": int64(1)}})
	if _, err := gears.Create(ctx, junk, metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict}); err == nil || !strings.Contains(err.Error(), `unknown field "spec.junk"`) {
		t.Errorf("strict: %v", err)
	}
	apply := func(manager string, spec map[string]any) (*unstructured.Unstructured, error) {
		return gears.Apply(ctx, "g2", object("Gear", "g2", map[string]any{"spec": spec}), metav1.ApplyOptions{FieldManager: manager})
	}
	bolt := func(name string, size int64) []any { return []any{map[string]any{"name": name, "size": size}} }
	if _, err := apply("one", map[string]any{"teeth": int64(3), "bolts": bolt("a", 1)}); err != nil {
		t.Fatal(err)
	}
	g, err := apply("two", map[string]any{"bolts": bolt("b", 2)})
	if err != nil {
		t.Fatal(err)
	}
	if bolts, _, _ := unstructured.NestedSlice(g.Object, "spec", "bolts"); len(bolts) != 2 {
		t.Errorf("bolts of two appliers: %v", bolts)
	}
	if _, err := apply("two", map[string]any{"teeth": int64(4), "bolts": bolt("b", 2)}); !apierrors.IsConflict(err) || !strings.Contains(err.Error(), ".spec.teeth") {
		t.Errorf("a field of another: %v", err)
	}
}

func gearSubresources(t *testing.T, gears dynamic.ResourceInterface) {
	ctx := t.Context()
	g, err := gears.Get(ctx, "gear", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	generation := g.GetGeneration()
	_ = unstructured.SetNestedField(g.Object, "Running", "status", "phase")
	_ = unstructured.SetNestedField(g.Object, "app=gear", "status", "selector")
	_ = unstructured.SetNestedField(g.Object, int64(2), "status", "replicas")
	_ = unstructured.SetNestedField(g.Object, int64(99), "spec", "teeth")
	if g, err = gears.UpdateStatus(ctx, g, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if teeth, _, _ := unstructured.NestedInt64(g.Object, "spec", "teeth"); teeth != 12 || g.GetGeneration() != generation {
		t.Errorf("an update of the status: %d teeth, generation %d", teeth, g.GetGeneration())
	}
	if g, err = gears.Patch(ctx, "gear", types.MergePatchType, []byte(`{"status":{"phase":"Gone"},"spec":{"replicas":2}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	if phase, _, _ := unstructured.NestedString(g.Object, "status", "phase"); phase != "Running" || g.GetGeneration() != generation+1 {
		t.Errorf("a patch of the object: phase %s, generation %d", phase, g.GetGeneration())
	}
	s, err := gears.Get(ctx, "gear", metav1.GetOptions{}, "scale")
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	var scale autoscalingv1.Scale
	if err := json.Unmarshal(b, &scale); err != nil || scale.Spec.Replicas != 2 || scale.Status.Replicas != 2 || scale.Status.Selector != "app=gear" {
		t.Errorf("scale %+v, %v", scale, err)
	}
	if _, err := gears.Patch(ctx, "gear", types.MergePatchType, []byte(`{"spec":{"replicas":7}}`), metav1.PatchOptions{}, "scale"); err != nil {
		t.Fatal(err)
	}
	if g, err = gears.Get(ctx, "gear", metav1.GetOptions{}); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := unstructured.NestedInt64(g.Object, "spec", "replicas"); n != 7 {
		t.Errorf("%d replicas after scaling to 7", n)
	}
}

func gearFields(t *testing.T, gears dynamic.ResourceInterface) {
	ctx := t.Context()
	w, err := gears.Watch(ctx, metav1.ListOptions{FieldSelector: "spec.material=brass"})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	for name, material := range map[string]string{"g3": "steel", "g4": "brass"} {
		if _, err := gears.Create(ctx, object("Gear", name, map[string]any{"spec": map[string]any{"teeth": int64(3), "material": material}}), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case e := <-w.ResultChan():
		if u := e.Object.(*unstructured.Unstructured); u.GetName() != "g4" {
			t.Errorf("watch of brass saw %s", u.GetName())
		}
	case <-time.After(patience):
		t.Error("watch of brass saw nothing")
	}
	for selector, want := range map[string]int{"spec.material=brass": 1, "spec.material!=brass": 3, "metadata.name=g3": 1} {
		l, err := gears.List(ctx, metav1.ListOptions{FieldSelector: selector})
		if err != nil || len(l.Items) != want {
			t.Errorf("%s: %d, want %d, %v", selector, len(l.Items), want, err)
		}
	}
	if _, err := gears.List(ctx, metav1.ListOptions{FieldSelector: "spec.teeth=3"}); !apierrors.IsBadRequest(err) {
		t.Errorf("a field that cannot be selected by: %v", err)
	}
}

func gearDocuments(t *testing.T, ns string) {
	for i, s := range cluster.servers {
		k := client(t, cluster.as(s, "admin", "system:masters"))
		b, err := k.CoreV1().RESTClient().Get().AbsPath("/apis/test.skein.io/v1/namespaces/"+ns+"/gears").SetHeader("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io").DoRaw(t.Context())
		var table metav1.Table
		if err != nil || json.Unmarshal(b, &table) != nil {
			t.Fatalf("table: %v", err)
		}
		var columns []string
		for _, c := range table.ColumnDefinitions {
			columns = append(columns, fmt.Sprint(c.Name, c.Priority))
		}
		if got := fmt.Sprint(columns, table.Rows[0].Cells); got != "[Name0 Teeth0 Phase1] [g2 3 <nil>]" {
			t.Errorf("table %s", got)
		}
		eventually(t, func(ctx context.Context) error {
			l, err := k.Discovery().ServerResourcesForGroupVersion("test.skein.io/v1")
			if err != nil {
				return err
			}
			found := map[string]metav1.APIResource{}
			for _, r := range l.APIResources {
				found[r.Name] = r
			}
			if g := found["gears"]; len(g.ShortNames) != 1 || len(g.Categories) != 2 || found["gears/status"].Kind != "Gear" || found["gears/scale"].Group != "autoscaling" {
				return fmt.Errorf("server %d: discovery %+v", i+1, found)
			}
			v3, err := k.Discovery().RESTClient().Get().AbsPath("/openapi/v3/apis/test.skein.io/v1").DoRaw(ctx)
			if err != nil || !strings.Contains(string(v3), "How many teeth it has.") || !strings.Contains(string(v3), "x-kubernetes-selectable-fields") || !strings.Contains(string(v3), "x-kubernetes-validations") {
				return fmt.Errorf("server %d: version 3 document: %w", i+1, err)
			}
			v2, err := k.Discovery().RESTClient().Get().AbsPath("/openapi/v2").SetHeader("Accept", "application/json").DoRaw(ctx)
			if err != nil || !strings.Contains(string(v2), "How many teeth it has.") {
				return fmt.Errorf("server %d: version 2 document: %w", i+1, err)
			}
			return nil
		})
	}
}

// Definitions that cannot be served say why.
func TestBadDefinitions(t *testing.T) {
	crds := definitions(t)
	for name, tc := range map[string]struct {
		change func(*apiextv1.CustomResourceDefinition)
		want   string
	}{
		"not structural": {func(c *apiextv1.CustomResourceDefinition) {
			c.Spec.Versions[0].Schema = schemaOf(t, `{"properties":{"spec":{"type":"object"}}}`)
		}, "type: Required value: must not be empty at the root"},
		"a default that is no value": {func(c *apiextv1.CustomResourceDefinition) {
			c.Spec.Versions[0].Schema = schemaOf(t, `{"type":"object","properties":{"n":{"type":"integer","default":"x"}}}`)
		}, "default: Invalid value"},
		"a rule that is none": {func(c *apiextv1.CustomResourceDefinition) {
			c.Spec.Versions[0].Schema = schemaOf(t, `{"type":"object","x-kubernetes-validations":[{"rule":"self.nothing > 1"}]}`)
		}, "undefined field 'nothing'"},
		"a rule that costs too much": {func(c *apiextv1.CustomResourceDefinition) {
			c.Spec.Versions[0].Schema = schemaOf(t, `{"type":"object","properties":{"l":{"type":"array","items":{"type":"array","items":{"type":"string"}},"x-kubernetes-validations":[{"rule":"self.all(x, x.all(y, self.all(z, z.all(w, w.contains(y)))))"}]}}}`)
		}, "cost"},
		"two versions stored": {func(c *apiextv1.CustomResourceDefinition) {
			v := c.Spec.Versions[0]
			v.Name = "v2"
			c.Spec.Versions = append(c.Spec.Versions, v)
		}, "must have exactly one version marked as storage version"},
		"another name": {func(c *apiextv1.CustomResourceDefinition) { c.Name = "other.test.skein.io" }, "must be spec.names.plural+\".\"+spec.group"},
		"a field to select by that is not there": {func(c *apiextv1.CustomResourceDefinition) {
			c.Spec.Versions[0].SelectableFields = []apiextv1.SelectableField{{JSONPath: ".spec.none"}}
		}, "selectableFields"},
		"conversion without a webhook": {func(c *apiextv1.CustomResourceDefinition) {
			c.Spec.Conversion = &apiextv1.CustomResourceConversion{Strategy: apiextv1.WebhookConverter}
		}, "spec.conversion.webhookClientConfig: Required value"},
	} {
		c := &apiextv1.CustomResourceDefinition{ObjectMeta: metav1.ObjectMeta{Name: "bads.test.skein.io"}, Spec: apiextv1.CustomResourceDefinitionSpec{
			Group: "test.skein.io", Scope: apiextv1.NamespaceScoped, Names: apiextv1.CustomResourceDefinitionNames{Plural: "bads", Kind: "Bad"},
			Versions: []apiextv1.CustomResourceDefinitionVersion{{Name: "v1", Served: true, Storage: true, Schema: schemaOf(t, `{"type":"object"}`)}}}}
		tc.change(c)
		_, err := crds.Create(t.Context(), c, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

// Two definitions cannot have one name; the second gets it when the first goes. Groups of Kubernetes' own want its approval.
func TestNamesOfDefinitions(t *testing.T) {
	ctx, crds := t.Context(), definitions(t)
	condition := func(name string, of apiextv1.CustomResourceDefinitionConditionType, status apiextv1.ConditionStatus, want string) {
		t.Helper()
		eventually(t, func(ctx context.Context) error {
			c, err := crds.Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			for _, have := range c.Status.Conditions {
				if have.Type == of && have.Status == status && strings.Contains(have.Reason+" "+have.Message, want) {
					return nil
				}
			}
			return fmt.Errorf("%s: %+v, want %s %s %q", name, c.Status.Conditions, of, status, want)
		})
	}
	crdOf(t, "wheels", "Wheel", func(c *apiextv1.CustomResourceDefinition) { c.Spec.Names.ShortNames = []string{"wh"} })
	second := &apiextv1.CustomResourceDefinition{ObjectMeta: metav1.ObjectMeta{Name: "whorls.test.skein.io"}, Spec: apiextv1.CustomResourceDefinitionSpec{
		Group: "test.skein.io", Scope: apiextv1.ClusterScoped, Names: apiextv1.CustomResourceDefinitionNames{Plural: "whorls", Kind: "Wheel", ShortNames: []string{"wh"}},
		Versions: []apiextv1.CustomResourceDefinitionVersion{{Name: "v1", Served: true, Storage: true, Schema: schemaOf(t, `{"type":"object"}`)}}}}
	approved := second.DeepCopy()
	approved.Name, approved.Spec.Group, approved.Spec.Names = "looms.test.k8s.io", "test.k8s.io", apiextv1.CustomResourceDefinitionNames{Plural: "looms", Kind: "Loom"}
	approved.Annotations = map[string]string{apiextv1.KubeAPIApprovedAnnotation: "unapproved, a test"}
	for _, c := range []*apiextv1.CustomResourceDefinition{second, approved} {
		if _, err := crds.Create(ctx, c, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := crds.Delete(context.Background(), c.Name, metav1.DeleteOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	condition(second.Name, apiextv1.NamesAccepted, apiextv1.ConditionFalse, "is already in use")
	condition(approved.Name, apiextv1.KubernetesAPIApprovalPolicyConformant, apiextv1.ConditionFalse, "UnapprovedAnnotation")
	bare := approved.DeepCopy()
	bare.Annotations, bare.Name, bare.Spec.Names.Plural = nil, "spindles.test.k8s.io", "spindles"
	if _, err := crds.Create(ctx, bare, metav1.CreateOptions{}); !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), "api-approved.kubernetes.io") {
		t.Errorf("a group of Kubernetes' own without approval: %v", err)
	}
	if err := crds.Delete(ctx, "wheels.test.skein.io", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	condition(second.Name, apiextv1.Established, apiextv1.ConditionTrue, "InitialNamesAccepted")
}

// A definition that goes takes its objects with it, waits for those that are held, and lets no new ones in.
func TestDefinitionGoesWithItsObjects(t *testing.T) {
	ctx, crds := t.Context(), definitions(t)
	crdOf(t, "pawls", "Pawl", nil)
	ns := namespace(t, admin(t))
	pawls := custom(t, cluster.servers[1], ns, "pawls")
	held := object("Pawl", "held", nil)
	held.SetFinalizers([]string{"test.skein.io/hold"})
	for _, o := range []*unstructured.Unstructured{object("Pawl", "free", nil), held} {
		if _, err := pawls.Create(ctx, o, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := crds.Delete(ctx, "pawls.test.skein.io", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	gone(t, "free", func(ctx context.Context) error { _, err := pawls.Get(ctx, "free", metav1.GetOptions{}); return err })
	eventually(t, func(ctx context.Context) error {
		if _, err := pawls.Create(ctx, object("Pawl", "late", nil), metav1.CreateOptions{}); !apierrors.IsMethodNotSupported(err) && !apierrors.IsForbidden(err) {
			return fmt.Errorf("a new object of a kind that goes: %v", err)
		}
		return nil
	})
	if _, err := pawls.Get(ctx, "held", metav1.GetOptions{}); err != nil {
		t.Errorf("the object that is held: %v", err)
	}
	if _, err := pawls.Patch(ctx, "held", types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	gone(t, "the definition", func(ctx context.Context) error {
		_, err := crds.Get(ctx, "pawls.test.skein.io", metav1.GetOptions{})
		return err
	})
	gone(t, "the kind", func(ctx context.Context) error { _, err := pawls.List(ctx, metav1.ListOptions{}); return err })
}

// A kind that was established by way of one server is served by the other at once.
func TestNewKindsOnAllServers(t *testing.T) {
	ctx := t.Context()
	var worst time.Duration
	for i := range 5 {
		plural := fmt.Sprintf("news%d", i)
		c := &apiextv1.CustomResourceDefinition{ObjectMeta: metav1.ObjectMeta{Name: plural + ".test.skein.io"}, Spec: apiextv1.CustomResourceDefinitionSpec{
			Group: "test.skein.io", Scope: apiextv1.NamespaceScoped, Names: apiextv1.CustomResourceDefinitionNames{Plural: plural, Kind: fmt.Sprintf("News%d", i)},
			Versions: []apiextv1.CustomResourceDefinitionVersion{{Name: "v1", Served: true, Storage: true, Schema: schemaOf(t, `{"type":"object"}`)}}}}
		w, err := definitions(t).Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + c.Name})
		if err != nil {
			t.Fatal(err)
		}
		there := custom(t, cluster.servers[1], "default", plural)
		if _, err := there.List(ctx, metav1.ListOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("a kind that is not defined: %v", err)
		}
		if _, err := definitions(t).Create(ctx, c, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := definitions(t).Delete(context.Background(), c.Name, metav1.DeleteOptions{}); err != nil {
				t.Error(err)
			}
		})
		created := time.Now()
		for e := range w.ResultChan() {
			if crd, ok := e.Object.(*apiextv1.CustomResourceDefinition); ok && serves(crd, "v1") {
				break
			}
		}
		w.Stop()
		if _, err := there.List(ctx, metav1.ListOptions{}); err != nil {
			t.Errorf("the other server, at once: %v", err)
		}
		worst = max(worst, time.Since(created))
	}
	t.Logf("from creation here to a list there: at most %v", worst.Round(time.Millisecond))
	if worst > 4*time.Second { // upstream's servers wait for 5 s
		t.Error("that is slow")
	}
}

// Objects are converted between versions by a webhook, in every request, and stored in one of them.
func TestConversionWebhooks(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	h := startHooks(t, ns)
	mux := http.NewServeMux()
	mux.HandleFunc("/convert", convertCogs)
	h.Config.Handler = mux
	service(t, k, ns, "hook", h.addr())
	path := "/convert"
	crdOf(t, "cogs", "Cog", func(c *apiextv1.CustomResourceDefinition) {
		c.Spec.Versions = []apiextv1.CustomResourceDefinitionVersion{
			{Name: "v1", Served: true, Storage: true, Schema: schemaOf(t, `{"type":"object","properties":{"size":{"type":"string"}}}`)},
			{Name: "v2", Served: true, Schema: schemaOf(t, `{"type":"object","properties":{"width":{"type":"string"},"height":{"type":"string"}}}`)},
		}
		c.Spec.Conversion = &apiextv1.CustomResourceConversion{Strategy: apiextv1.WebhookConverter, Webhook: &apiextv1.WebhookConversion{ConversionReviewVersions: []string{"v1"},
			ClientConfig: &apiextv1.WebhookClientConfig{CABundle: h.ca, Service: &apiextv1.ServiceReference{Namespace: ns, Name: "hook", Path: &path}}}}
	})
	dyn, err := dynamic.NewForConfig(cluster.as(cluster.servers[1], "admin", "system:masters"))
	if err != nil {
		t.Fatal(err)
	}
	of := func(version string) dynamic.ResourceInterface {
		return dyn.Resource(schema.GroupVersionResource{Group: "test.skein.io", Version: version, Resource: "cogs"}).Namespace(ns)
	}
	w, err := of("v2").Watch(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	if _, err := of("v1").Create(ctx, object("Cog", "a", map[string]any{"size": "3x4"}), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	two := object("Cog", "b", map[string]any{"width": "5", "height": "6"})
	two.SetAPIVersion("test.skein.io/v2")
	if _, err := of("v2").Create(ctx, two, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	check := func(u *unstructured.Unstructured, err error, want map[string]any) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		for key, v := range want {
			if u.Object[key] != v {
				t.Errorf("%s %s: %v, want %v", u.GetAPIVersion(), u.GetName(), u.Object, want)
			}
		}
	}
	u, err := of("v2").Get(ctx, "a", metav1.GetOptions{})
	check(u, err, map[string]any{"width": "3", "height": "4", "apiVersion": "test.skein.io/v2"})
	u, err = of("v1").Get(ctx, "b", metav1.GetOptions{})
	check(u, err, map[string]any{"size": "5x6"})
	u, err = of("v2").Patch(ctx, "a", types.MergePatchType, []byte(`{"height":"9"}`), metav1.PatchOptions{})
	check(u, err, map[string]any{"width": "3", "height": "9"})
	l, err := of("v1").List(ctx, metav1.ListOptions{})
	if err != nil || len(l.Items) != 2 || l.Items[0].Object["size"] != "3x9" {
		t.Errorf("list: %v, %v", l, err)
	}
	select {
	case e := <-w.ResultChan():
		check(e.Object.(*unstructured.Unstructured), nil, map[string]any{"width": "3", "apiVersion": "test.skein.io/v2"})
	case <-time.After(patience):
		t.Error("the watch saw nothing")
	}
	if _, err := of("v2").Patch(ctx, "a", types.MergePatchType, []byte(`{"height":"refuse"}`), metav1.PatchOptions{}); err == nil || !strings.Contains(err.Error(), "conversion webhook for test.skein.io/v2, Kind=Cog failed: refused") {
		t.Errorf("a conversion that is refused: %v", err)
	}

	// Another version is stored from now on: both are remembered, as both are in the store.
	crds := definitions(t)
	if _, err := crds.Patch(ctx, "cogs.test.skein.io", types.JSONPatchType, []byte(`[{"op":"replace","path":"/spec/versions/0/storage","value":false},{"op":"replace","path":"/spec/versions/1/storage","value":true}]`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	c, err := crds.Get(ctx, "cogs.test.skein.io", metav1.GetOptions{})
	if err != nil || fmt.Sprint(c.Status.StoredVersions) != "[v1 v2]" {
		t.Errorf("stored versions %v, %v", c.Status.StoredVersions, err)
	}
	eventually(t, func(ctx context.Context) error {
		if _, err := of("v1").Patch(ctx, "b", types.MergePatchType, []byte(fmt.Sprintf(`{"metadata":{"annotations":{"at":"%d"}}}`, time.Now().UnixNano())), metav1.PatchOptions{}); err != nil {
			return err
		}
		r, err := cluster.store.KV.Get(ctx, "/registry/test.skein.io/cogs/"+ns+"/b")
		if err != nil || len(r.Kvs) != 1 || !strings.Contains(string(r.Kvs[0].Value), `"width":"5"`) {
			return errors.New("it is not stored in the new version")
		}
		return nil
	})
	u, err = of("v1").Get(ctx, "b", metav1.GetOptions{})
	check(u, err, map[string]any{"size": "5x6"})
	// A version that may be in the store cannot be taken away; once it is not served, nobody sees it.
	if _, err := crds.Patch(ctx, "cogs.test.skein.io", types.JSONPatchType, []byte(`[{"op":"remove","path":"/spec/versions/0"}]`), metav1.PatchOptions{}); !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), "status.storedVersions[0]") {
		t.Errorf("a stored version is taken away: %v", err)
	}
	if _, err := crds.Patch(ctx, "cogs.test.skein.io", types.JSONPatchType, []byte(`[{"op":"replace","path":"/spec/versions/0/served","value":false}]`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	gone(t, "v1", func(ctx context.Context) error { _, err := of("v1").List(ctx, metav1.ListOptions{}); return err })
}

// convertCogs is the webhook: v1 has a size of 3x4, v2 width and height.
func convertCogs(w http.ResponseWriter, r *http.Request) {
	var review apiextv1.ConversionReview
	if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	resp := &apiextv1.ConversionResponse{UID: review.Request.UID, Result: metav1.Status{Status: metav1.StatusSuccess}}
	for _, raw := range review.Request.Objects {
		u := &unstructured.Unstructured{}
		if err := u.UnmarshalJSON(raw.Raw); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if u.Object["height"] == "refuse" {
			resp.Result = metav1.Status{Status: metav1.StatusFailure, Message: "refused"}
			break
		}
		if to := review.Request.DesiredAPIVersion; u.GetAPIVersion() != to {
			u.SetAPIVersion(to)
			if strings.HasSuffix(to, "v2") {
				size, _ := u.Object["size"].(string)
				u.Object["width"], u.Object["height"], _ = strings.Cut(size, "x")
				delete(u.Object, "size")
			} else {
				u.Object["size"] = fmt.Sprintf("%vx%v", u.Object["width"], u.Object["height"])
				delete(u.Object, "width")
				delete(u.Object, "height")
			}
		}
		raw.Raw, raw.Object = nil, u
		resp.ConvertedObjects = append(resp.ConvertedObjects, raw)
	}
	review.Request, review.Response = nil, resp
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(review) // fails when the caller has gone
}
